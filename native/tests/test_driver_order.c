/* The load generators' ring with VIRTIO_F_IN_ORDER, and a device played by hand. */
#include "../src/driver_ring.h"
#include "harness.h"
#include <string.h>

enum {
    SIZE = 8,
    CHAIN = 3,
    AT_DESC = 0,
    AT_AVAIL = 0x400,
    AT_USED = 0x800,
    MEMORY = 0x1000,
    WHOLE = 48
};

struct played {
    char memory[MEMORY] __attribute__((aligned(16)));
    struct driver_ring ring;
    uint16_t used;          /* split: the used index */
    struct driver_place at; /* packed: where the next is used */
};

/* Descriptors of one address each, for the device to write; chains of `chain` of them. */
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
        p->ring.desc[i] = (struct vring_desc){
            .addr = 0x100u * i, .len = WHOLE / chain, .flags = VRING_DESC_F_WRITE};
}

static void offer(struct played *p, uint16_t head)
{
    driver_ring_offer(&p->ring, head);
    driver_ring_publish(&p->ring);
}

/* The device has used `n` chains more, and tells of the last of them alone, where the first would
 * be told of. */
static void tell(struct played *p, uint16_t n, uint16_t id, uint32_t len)
{
    struct driver_ring *r = &p->ring;

    if (r->slot) {
        struct vring_packed_desc *d = &r->slot[p->at.at];
        d->id = id;
        d->len = len;
        d->flags = p->at.wrap ? DRIVER_AVAIL | DRIVER_USED : 0;
        p->at = driver_place_after(r, p->at, (uint32_t)n * r->chain);
        return;
    }
    r->used_ring[p->used & (SIZE - 1)] = (struct vring_used_elem){.id = id, .len = len};
    p->used = (uint16_t)(p->used + n);
    r->used[1] = p->used;
}

static void expect(struct played *p, uint32_t id, uint32_t len)
{
    struct vring_used_elem elem = driver_ring_elem(&p->ring, p->ring.used_idx);

    CHECK_EQ(elem.id, id);
    CHECK_EQ(elem.len, len);
    driver_ring_next(&p->ring);
}

static void expect_break(struct played *p)
{
    CHECK_EQ(driver_ring_elem(&p->ring, p->ring.used_idx).id, OUT_OF_ORDER);
    driver_ring_close(&p->ring);
}

/* Split rings name a chain by where it is in the ring, packed rings by the driver's own id. */
static uint16_t name(const struct played *p, uint16_t place, uint16_t head)
{
    return p->ring.slot ? head : place;
}

/* Three chains a round, which meet the end of the ring anywhere; the last is told of by itself. */
static void batches(unsigned layout)
{
    static struct played p;

    play_chains(&p, layout, 1);
    for (uint16_t round = 0; round < 9; round++) {
        offer(&p, 5);
        offer(&p, 2);
        offer(&p, 7);
        CHECK_EQ(driver_ring_pending(&p.ring), 0);
        tell(&p, 2, name(&p, (3 * round + 1) % SIZE, 2), 11);
        CHECK_EQ(driver_ring_pending(&p.ring), 2);
        expect(&p, 5, WHOLE);
        expect(&p, 2, 11);
        tell(&p, 1, name(&p, (3 * round + 2) % SIZE, 7), 12);
        CHECK_EQ(driver_ring_pending(&p.ring), 1);
        expect(&p, 7, 12);
        CHECK_EQ(driver_ring_pending(&p.ring), 0);
    }
    driver_ring_close(&p.ring);
}

static void a_batch_is_told_of_by_its_last(void)
{
    batches(DRIVER_RING_SPLIT);
    batches(DRIVER_RING_PACKED);
}

/* Of several batches each has its element, where the one before ended. */
static void several(unsigned layout)
{
    static struct played p;
    struct driver_ring *r = &p.ring;

    play_chains(&p, layout, 2);
    for (uint16_t i = 0; i < 4; i++)
        offer(&p, 2 * i);
    tell(&p, 2, name(&p, 2, 2), 11);
    CHECK_EQ(driver_ring_pending(r), 2);
    tell(&p, 1, name(&p, 4, 4), 12);
    tell(&p, 1, name(&p, 6, 6), 0);
    CHECK_EQ(driver_ring_pending(r), 4);
    expect(&p, 0, WHOLE);
    CHECK_EQ(driver_ring_pending(r), 3);
    expect(&p, 2, 11);
    expect(&p, 4, 12);
    expect(&p, 6, 0);
    CHECK_EQ(driver_ring_pending(r), 0);
    driver_ring_close(r);
}

static void batches_follow_one_another(void)
{
    several(DRIVER_RING_SPLIT);
    several(DRIVER_RING_PACKED);
}

/* Chains 5 and 2 are in flight, in this order; `n` are used, as the device says. */
static void wrong(unsigned layout, uint16_t n, uint16_t id)
{
    static struct played p;

    play_chains(&p, layout, 1);
    offer(&p, 5);
    offer(&p, 2);
    tell(&p, n, id, 0);
    CHECK_EQ(driver_ring_pending(&p.ring), n);
    expect_break(&p);
}

static void another_order_is_noticed(void)
{
    wrong(DRIVER_RING_SPLIT, 1, 1); /* the second, but one is used */
    wrong(DRIVER_RING_SPLIT, 1, 6); /* none in flight */
    wrong(DRIVER_RING_SPLIT, 2, 2); /* not there yet */
    wrong(DRIVER_RING_PACKED, 1, 6);
    wrong(DRIVER_RING_PACKED, 1, UINT16_MAX);
}

/* The chain behind a batch is none of it. */
static void known_ones(unsigned layout)
{
    static struct played p;

    play_chains(&p, layout, 1);
    for (uint16_t i = 0; i < 3; i++)
        offer(&p, i);
    tell(&p, 2, 1, 0);
    CHECK_EQ(driver_ring_pending(&p.ring), 2);
    tell(&p, 1, 1, 0); /* once more */
    CHECK_EQ(driver_ring_pending(&p.ring), 3);
    expect(&p, 0, WHOLE);
    expect(&p, 1, 0);
    expect_break(&p);
}

static void what_was_told_of_is_not_told_again(void)
{
    known_ones(DRIVER_RING_SPLIT);
    known_ones(DRIVER_RING_PACKED);
}

/* So a caller that compares the two refuses it. */
static void an_index_beyond_what_is_in_flight_is_told(void)
{
    static struct played p;

    play_chains(&p, DRIVER_RING_SPLIT, 1);
    offer(&p, 0);
    tell(&p, 2, 0, 0);
    CHECK_EQ(driver_ring_pending(&p.ring), 2);
    CHECK_EQ(driver_ring_in_flight(&p.ring), 1);
    driver_ring_close(&p.ring);
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
        tell(&p, 1, first, i);
        CHECK_EQ(driver_ring_pending(r), 1);
        expect(&p, CHAIN * (i % 2), i);
    }
    driver_ring_close(r);
}

static const struct test tests[] = {
    TEST(a_batch_is_told_of_by_its_last),
    TEST(batches_follow_one_another),
    TEST(another_order_is_noticed),
    TEST(what_was_told_of_is_not_told_again),
    TEST(an_index_beyond_what_is_in_flight_is_told),
    TEST(descriptors_go_round_a_split_ring),
};
MAIN(tests)
