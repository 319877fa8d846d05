/* The load generators' ring with VIRTIO_F_IN_ORDER, and a device played by hand. */
#include "../src/driver_ring.h"
#include "harness.h"
#include <string.h>

enum { SIZE = 8, CHAIN = 3, AT_DESC = 0, AT_AVAIL = 0x400, AT_USED = 0x800, MEMORY = 0x1000 };

struct played {
    char memory[MEMORY] __attribute__((aligned(16)));
    struct driver_ring ring;
    uint16_t used;          /* split: the used index */
    struct driver_place at; /* packed: where the next is used */
};

/* Chains of one descriptor, each of another address; their heads are 0 to 7. */
static void play_chains(struct played *p, unsigned layout, uint16_t chain)
{
    struct driver_memory memory = {.host = p->memory, .size = MEMORY};

    memset(p, 0, sizeof(*p));
    CHECK_EQ(driver_ring_open(&p->ring, &memory, AT_DESC, AT_AVAIL, AT_USED, SIZE, chain,
                              layout | DRIVER_RING_IN_ORDER),
             0);
    p->ring.kick_fd = -1;
    p->at = p->ring.take;
    for (uint16_t i = 0; i < SIZE; i++)
        p->ring.desc[i] = (struct vring_desc){.addr = 0x100u * i, .len = 16};
}

static void offer(struct played *p, uint16_t head)
{
    driver_ring_offer(&p->ring, head);
    driver_ring_publish(&p->ring);
}

/* The device has used `n` chains more, and tells of the last of them, by `id`, alone. */
static void tell(struct played *p, uint16_t n, uint16_t id)
{
    struct driver_ring *r = &p->ring;

    if (r->slot) {
        struct vring_packed_desc *d = &r->slot[p->at.at];
        d->id = id;
        d->flags = p->at.wrap ? DRIVER_AVAIL | DRIVER_USED : 0;
        p->at = driver_place_after(r, p->at, (uint32_t)n * r->chain);
        return;
    }
    p->used = (uint16_t)(p->used + n);
    r->used_ring[(p->used - 1u) & (SIZE - 1)].id = id;
    r->used[1] = p->used;
}

static void expect(struct played *p, uint32_t id)
{
    CHECK_EQ(driver_ring_elem(&p->ring, p->ring.used_idx).id, id);
    driver_ring_next(&p->ring);
}

/* Split rings name a chain by where it is in the ring, packed rings by the driver's own id. */
static uint16_t name(const struct played *p, uint16_t place, uint16_t head)
{
    return p->ring.slot ? head : place;
}

static void batches(unsigned layout)
{
    static struct played p;

    play_chains(&p, layout, 1);
    for (uint16_t round = 0; round < 3; round++) {
        offer(&p, 5);
        offer(&p, 2);
        offer(&p, 7);
        CHECK_EQ(driver_ring_pending(&p.ring), 0);
        tell(&p, 2, name(&p, (3 * round + 1) % SIZE, 2));
        CHECK_EQ(driver_ring_pending(&p.ring), 2);
        expect(&p, 5);
        expect(&p, 2);
        tell(&p, 1, name(&p, (3 * round + 2) % SIZE, 7));
        CHECK_EQ(driver_ring_pending(&p.ring), 1);
        expect(&p, 7);
        CHECK_EQ(driver_ring_pending(&p.ring), 0);
    }
    driver_ring_close(&p.ring);
}

static void a_batch_is_told_of_by_its_last(void)
{
    batches(DRIVER_RING_SPLIT);
    batches(DRIVER_RING_PACKED);
}

static void wrong(unsigned layout, uint16_t id)
{
    static struct played p;

    play_chains(&p, layout, 1);
    offer(&p, 5);
    offer(&p, 2);
    tell(&p, 1, id);
    CHECK_EQ(driver_ring_pending(&p.ring), 1);
    expect(&p, OUT_OF_ORDER);
    driver_ring_close(&p.ring);
}

static void another_order_is_noticed(void)
{
    wrong(DRIVER_RING_SPLIT, 1); /* the second */
    wrong(DRIVER_RING_SPLIT, 6); /* none */
    wrong(DRIVER_RING_PACKED, 6);
}

static void descriptors_go_round_a_split_ring(void)
{
    static struct played p;
    struct driver_ring *r = &p.ring;

    play_chains(&p, DRIVER_RING_SPLIT, CHAIN);
    for (uint16_t i = 0; i < 5; i++) {
        offer(&p, CHAIN * (i % 2));
        uint16_t first = r->avail[2 + i];
        CHECK_EQ(first, CHAIN * i % SIZE);
        for (uint16_t k = 0; k < CHAIN; k++) {
            const struct vring_desc *d = &((struct vring_desc *)p.memory)[(first + k) % SIZE];
            CHECK_EQ(d->addr, 0x100u * (CHAIN * (i % 2) + k));
            CHECK_EQ(d->next, (first + k + 1) % SIZE);
        }
        tell(&p, 1, first);
        CHECK_EQ(driver_ring_pending(r), 1);
        expect(&p, CHAIN * (i % 2));
    }
    driver_ring_close(r);
}

static const struct test tests[] = {
    TEST(a_batch_is_told_of_by_its_last),
    TEST(another_order_is_noticed),
    TEST(descriptors_go_round_a_split_ring),
};
MAIN(tests)
