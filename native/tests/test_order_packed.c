/* VIRTIO_F_IN_ORDER on packed rings, where one used descriptor may tell of a batch. */
#define PACKED_RINGS
#include "order_cases.h"

/* So many chains into which the device can write nothing, and one with room. */
static void readable(struct hand *h, uint16_t n)
{
    for (uint16_t i = 0; i < n; i++)
        set_desc(h->rig.ring.desc, i, buffer_addr(&h->rig.ring, i), 1, 0, 0);
}

/* What the next used descriptor says, of which the driver takes as many chains as that. */
static void expect_batch(struct hand *h, uint16_t last, uint32_t len, uint16_t n)
{
    struct packed_half *p = h->rig.ring.packed;
    const struct vring_packed_desc *d = &p->slot[p->take.idx];

    CHECK(packed_is_used(p, p->take));
    CHECK_EQ(d->id, last);
    CHECK_EQ(d->len, len);
    CHECK_EQ(!(d->flags & VRING_DESC_F_WRITE), !len);
    p->take = place_after(p->take, n, p->size);
    for (uint16_t i = 0; i < n; i++)
        p->length[last - i] = 0;
}

static void expect_no_more(struct hand *h)
{
    CHECK(!packed_is_used(h->rig.ring.packed, h->rig.ring.packed->take));
}

static void one_descriptor_tells_of_a_batch(void)
{
    for (int tracked = 0; tracked < 2; tracked++) {
        struct hand h;
        hand_open(&h, BEFORE_WRAP(ORDERED, 2), tracked);
        readable(&h, 5);
        for (int round = 0; round < 3; round++) {
            hand_pop(&h, 0, ORDERED);
            for (uint16_t i = ORDERED; i > 0; i--)
                ring_push(h.rig.queue, i - 1, i - 1 < 5 ? 0 : 1);
            ring_publish(h.rig.queue);
            /* The first with room ends the batch, and those after it stand alone. */
            expect_batch(&h, 5, 1, 6);
            expect_batch(&h, 6, 1, 1);
            expect_batch(&h, 7, 1, 1);
            expect_no_more(&h);
        }
        hand_close(&h);
    }
}

static void a_batch_ends_where_it_is_shown(void)
{
    struct hand h;

    hand_open(&h, 0, false);
    readable(&h, ORDERED);
    hand_pop(&h, 0, 5);
    ring_push(h.rig.queue, 0, 0);
    ring_push(h.rig.queue, 1, 0);
    expect_no_more(&h);
    ring_show(h.rig.queue);
    ring_push(h.rig.queue, 2, 0);
    ring_publish(h.rig.queue);
    ring_push(h.rig.queue, 4, 0);
    ring_push(h.rig.queue, 3, 0);
    ring_publish(h.rig.queue);
    expect_batch(&h, 1, 0, 2);
    expect_batch(&h, 2, 0, 1);
    expect_batch(&h, 4, 0, 2);
    expect_no_more(&h);
    hand_close(&h);
}

/* Behind one with room a batch begins that is not the first. */
static void a_batch_behind_another_chain(void)
{
    struct hand h;

    hand_open(&h, 0, false);
    readable(&h, ORDERED);
    set_desc(h.rig.ring.desc, 0, buffer_addr(&h.rig.ring, 0), 1, VRING_DESC_F_WRITE, 0);
    hand_pop(&h, 0, 4);
    for (uint16_t i = 0; i < 4; i++)
        ring_push(h.rig.queue, i, i == 0);
    ring_publish(h.rig.queue);
    expect_batch(&h, 0, 1, 1);
    expect_batch(&h, 3, 0, 3);
    expect_no_more(&h);
    hand_close(&h);
}

static const struct test tests[] = {
    ORDER_CASES,
    TEST(one_descriptor_tells_of_a_batch),
    TEST(a_batch_ends_where_it_is_shown),
    TEST(a_batch_behind_another_chain),
};
MAIN(tests)
