/* The packed ring where the driver keeps the rules, and what only packed rings have. */
#define PACKED_RINGS
#include "logged.h"
#include "ring_cases.h"

static void start_at(struct rig *r, uint16_t size, uint64_t features, uint32_t next_index)
{
    rig_open_at(r, size, features, 0, 0, 0, (uint16_t)next_index);
    CHECK_EQ(queue_halt(&r->control, r->queue), (next_index & 0xffff) * 0x10001u);
    queue_run(&r->control, r->queue);
}

/* ---- places ---- */

static void a_size_need_be_no_power_of_two(void)
{
    struct rig r;

    rig_open(&r, 7, EVENT_IDX);
    one_byte_each(&r.ring);
    for (uint16_t i = 0; i < 40; i++)
        round_trip(&r.ring, i % 7);
    /* 40 = 5 * 7 + 5: five times round, so the counters are 0. */
    CHECK_EQ(queue_halt(&r.control, r.queue), 0x00050005);
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

static void a_queue_goes_on_where_it_was_stopped(void)
{
    struct rig r;

    start_at(&r, 8, 0, WRAP | 6);
    link_chain(&r.ring, r.ring.desc, 0, 3);
    for (int i = 0; i < 20; i++) {
        round_trip(&r.ring, 0);
        uint32_t next = queue_halt(&r.control, r.queue);
        CHECK_EQ(next, index_of(r.ring.packed->fill) * 0x10001u);
        CHECK_EQ(vhost_queue_free(r.queue), 0);
        struct vhost_queue_config config = driver_config(&r.ring, 0);
        config.next_index = next;
        CHECK_EQ(vhost_queue_new(&config, &r.probe->device, r.guest.memory, &r.queue), 0);
        queue_run(&r.control, r.queue);
    }
    rig_close(&r);
}

/* What DPDK's front-end says of a new ring: nothing of the used index. */
static void a_front_end_may_know_only_the_lower_half(void)
{
    const uint16_t index[] = {WRAP, WRAP | 5, 5, 0};

    for (size_t i = 0; i < ARRAY_SIZE(index); i++) {
        struct rig r;
        rig_open_at(&r, 8, 0, 0, 0, 0, WRAP | 5);
        queue_halt(&r.control, r.queue);
        CHECK_EQ(vhost_queue_free(r.queue), 0);
        packed_begin(r.ring.packed, index[i]);
        struct vhost_queue_config config = driver_config(&r.ring, 0);
        config.next_index &= 0xffff;
        CHECK_EQ(vhost_queue_new(&config, &r.probe->device, r.guest.memory, &r.queue), 0);
        queue_run(&r.control, r.queue);
        one_byte_each(&r.ring);
        for (uint16_t k = 0; k < 20; k++)
            round_trip(&r.ring, k % 8);
        rig_close(&r);
    }
}

static void an_index_outside_the_ring_is_refused(void)
{
    const uint32_t wrong[] = {0x80008008, 0x80088000, 0x7fff7fff, UINT32_MAX};
    struct rig r;

    rig_open(&r, 8, 0);
    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct vhost_queue_config config = driver_config(&r.ring, 0);
        struct vhost_queue *q;
        config.next_index = wrong[i];
        CHECK_EQ(vhost_queue_new(&config, &r.probe->device, r.guest.memory, &q), -EINVAL);
    }
    rig_close(&r);
}

static void areas_are_aligned(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    for (int i = 0; i < 3; i++) {
        struct vhost_queue_config config = driver_config(&r.ring, 0);
        struct vhost_queue *q;
        config.desc += i == 0 ? 8 : 0;
        config.avail += i == 1 ? 2 : 0;
        config.used += i == 2 ? 2 : 0;
        CHECK_EQ(vhost_queue_new(&config, &r.probe->device, r.guest.memory, &q), -EINVAL);
    }
    rig_close(&r);
}

/* ---- many in flight ---- */

static void chains_of_unequal_lengths(void)
{
    struct rig r;

    rig_open(&r, 16, 0);
    struct driver_ring *d = &r.ring;
    r.probe->hold = true;
    for (int round = 0; round < 50; round++) {
        link_chain(d, d->desc, 0, 1);
        link_chain(d, d->desc, 1, 2);
        link_chain(d, d->desc, 3, 3);
        link_chain(d, d->desc, 6, 4);
        driver_offer(d, 6);
        driver_offer(d, 0);
        driver_offer(d, 3);
        driver_offer(d, 1);
        driver_publish(d);
        driver_kick(d);
        while (probe_count(r.probe) < 4u * (unsigned)(round + 1))
            queue_sync(&r.control, r.queue);
        eventfd_write(r.probe->release, 1);
        driver_await_used(d, 4);
        const uint32_t id[] = {6, 0, 3, 1};
        for (int i = 0; i < 4; i++)
            CHECK_EQ(driver_take(d).id, id[i]);
    }
    rig_close(&r);
}

/* All chains of a batch become visible at once, by the flags of the first. */
static void what_was_pushed_is_shown_in_one_step(void)
{
    struct rig r;
    struct chain c;
    uint16_t head[3];

    rig_open(&r, 8, 0);
    queue_halt(&r.control, r.queue);
    struct driver_ring *d = &r.ring;
    struct vhost_queue *q = r.queue;
    one_byte_each(d);
    for (uint16_t i = 0; i < 3; i++)
        driver_offer(d, i);
    driver_publish(d);
    for (int i = 0; i < 3; i++) {
        CHECK(ring_pending(q) > 0);
        CHECK(ring_pop(q, &c));
        head[i] = c.head;
    }
    CHECK_EQ(ring_pending(q), 0);
    CHECK(!ring_pop(q, &c));
    CHECK(!q->broken);
    q->dirty = true; /* no iothread is there to be told */
    struct vring_packed_desc before[8];
    memcpy(before, d->packed->slot, sizeof(before));
    for (int i = 2; i >= 0; i--)
        ring_push(q, head[i], 1);
    /* A server killed here leaves the next one what the driver wrote. */
    CHECK_EQ(memcmp(before, d->packed->slot, sizeof(before)), 0);
    ring_show(q);
    q->dirty = false;
    CHECK_EQ(driver_used_idx(d), 3);
    for (uint32_t i = 3; i--;)
        CHECK_EQ(driver_take(d).id, i);
    queue_run(&r.control, q);
    rig_close(&r);
}

/* Chains of three in a ring of eight, un-popped over the end of the ring. */
/* What was completed and is not shown is not the driver's. */
static void made_available_again_before_it_was_shown(void)
{
    struct rig r;
    struct chain c;

    rig_open(&r, 8, 0);
    queue_halt(&r.control, r.queue);
    struct packed_half *p = r.ring.packed;
    struct vhost_queue *q = r.queue;
    q->thread = r.control.thread; /* which hears of the end, and of nothing else */
    q->dirty = true;
    for (int round = 0; round < 2; round++) {
        p->take = p->fill;
        for (uint16_t i = 0; i < 8; i++)
            packed_put(p, buffer_addr(&r.ring, 0), 1, i, 0);
        packed_publish(p);
        for (int i = 0; i < 8 && ring_pop(q, &c); i++)
            ring_push(q, c.head, 0);
        CHECK_EQ(q->broken, round);
    }
    CHECK_EQ(await_event(&r.control, VHOST_EVENT_BROKEN, 1000).value, VHOST_FAULT_CHAIN_LENGTH);
    q->thread = NULL;
    q->dirty = false;
    queue_run(&r.control, q);
    rig_close(&r);
}

static void chains_are_unpopped_newest_first(void)
{
    struct rig r;
    struct chain c[2];

    start_at(&r, 8, 0, WRAP | 3);
    queue_halt(&r.control, r.queue);
    struct driver_ring *d = &r.ring;
    struct vhost_queue *q = r.queue;
    link_chain(d, d->desc, 0, 3);
    link_chain(d, d->desc, 3, 3);
    for (int round = 0; round < 20; round++) {
        uint32_t next = ring_next_index(q);
        driver_offer(d, 0);
        driver_offer(d, 3);
        driver_publish(d);
        CHECK(ring_pop(q, &c[0]));
        CHECK(ring_pop(q, &c[1]));
        ring_unpop(q, c[1].head);
        ring_unpop(q, c[0].head);
        CHECK_EQ(ring_next_index(q), next);
        CHECK_EQ(q->in_flight, 0);
        CHECK(ring_pop(q, &c[0]));
        CHECK_EQ(c[0].head, 0);
        CHECK(ring_pop(q, &c[1]));
        CHECK_EQ(c[1].head, 3);
        q->dirty = true;
        ring_push(q, 3, 1);
        ring_push(q, 0, 0);
        ring_show(q);
        q->dirty = false;
        CHECK_EQ(driver_take(d).id, 3);
        CHECK_EQ(driver_take(d).id, 0);
    }
    queue_run(&r.control, q);
    rig_close(&r);
}

/* ---- indirect tables ---- */

/* Section 2.8.7: of a table's entries all flags but WRITE are ignored, and so is the id. */
static void next_and_id_in_a_table_mean_nothing(void)
{
    struct rig r;

    rig_open(&r, 4, INDIRECT);
    struct driver_ring *d = &r.ring;
    struct vring_packed_desc *table = (struct vring_packed_desc *)driver_table(d);
    table[0] = (struct vring_packed_desc){buffer_addr(d, 0), 1, 0xffff, AVAIL | USED};
    table[1] = (struct vring_packed_desc){buffer_addr(d, 1), 1, 0xffff,
                                          VRING_DESC_F_NEXT | VRING_DESC_F_WRITE};
    packed_put(d->packed, d->base + AT_TABLE, 32, 2, VRING_DESC_F_INDIRECT);
    d->packed->length[2] = 1;
    driver_publish(d);
    driver_kick(d);
    struct vring_used_elem e = driver_take(d);
    CHECK_EQ(e.id, 2);
    CHECK_EQ(e.len, 1);
    CHECK_EQ(probe_get(r.probe, 0).readable, 1);
    rig_close(&r);
}

/* ---- the dirty log ---- */

static void descriptors_and_the_wish_are_logged_where_they_are(void)
{
    struct rig r;

    rig_open_at(&r, 1024, 0, 0, 0, 0, WRAP | 1022);
    struct driver_ring *d = &r.ring;
    struct vhost_log *log = log_of_guest();
    set_log(&r.control, r.queue, log, d->base + AT_USED);
    take_pages(log);
    one_byte_each(d);
    /* The last two places and the first two: the ring's last page and its first. */
    r.probe->hold = true;
    for (uint16_t i = 0; i < 4; i++)
        driver_offer(d, i);
    driver_publish(d);
    driver_kick(d);
    while (probe_count(r.probe) < 4)
        queue_sync(&r.control, r.queue);
    struct pages p = take_pages(log);
    expect_pages(&p, d->base + AT_USED, 4);
    forget_pages(&p, d->base + AT_USED, 4);
    expect_no_more(&p);
    eventfd_write(r.probe->release, 1);
    driver_await_used(d, 4);
    queue_sync(&r.control, r.queue);
    p = take_pages(log);
    expect_pages(&p, d->base + AT_DESC, 32);
    expect_pages(&p, d->base + AT_DESC + 1022 * 16, 32);
    forget_pages(&p, d->base + AT_DESC, 32);
    forget_pages(&p, d->base + AT_DESC + 1022 * 16, 32);
    forget_pages(&p, d->base + AT_USED, 4);
    expect_no_more(&p);

    set_log(&r.control, r.queue, log, UNLOGGED);
    take_pages(log);
    r.probe->hold = false;
    driver_take(d);
    driver_take(d);
    driver_take(d);
    driver_take(d);
    round_trip(d, 7);
    queue_sync(&r.control, r.queue);
    p = take_pages(log);
    expect_no_more(&p);
    rig_close(&r);
    vhost_log_unref(log);
}

static const struct test tests[] = {
    RING_CASES,
    TEST(a_size_need_be_no_power_of_two),
    TEST(a_queue_goes_on_where_it_was_stopped),
    TEST(a_front_end_may_know_only_the_lower_half),
    TEST(an_index_outside_the_ring_is_refused),
    TEST(areas_are_aligned),
    TEST(chains_of_unequal_lengths),
    TEST(what_was_pushed_is_shown_in_one_step),
    TEST(made_available_again_before_it_was_shown),
    TEST(chains_are_unpopped_newest_first),
    TEST(next_and_id_in_a_table_mean_nothing),
    TEST(descriptors_and_the_wish_are_logged_where_they_are),
};
MAIN(tests)
