/*
 * Rings where the driver keeps the rules: chains, indirect tables, suppression, wrap.  A program
 * says by LAYOUT which rings they are.
 */
#ifndef RING_CASES_H
#define RING_CASES_H

#include "rig.h"

static void fill(const struct driver_ring *d, uint64_t offset, const char *text)
{
    memcpy(buffer_at(d, offset), text, strlen(text));
}

static void a_chain_arrives_and_returns(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    struct driver_ring *d = &r.ring;
    fill(d, 0, "question");
    set_desc(d->desc, 5, buffer_addr(d, 0), 8, VRING_DESC_F_NEXT, 2);
    set_desc(d->desc, 2, buffer_addr(d, 100), 16, VRING_DESC_F_WRITE, 0);
    driver_send(d, 5);
    struct vring_used_elem e = driver_take(d);
    CHECK_EQ(e.id, 5);
    CHECK_EQ(e.len, 16);
    struct note n = probe_get(r.probe, 0);
    CHECK_EQ(n.readable, 1);
    CHECK_EQ(n.writable, 1);
    CHECK_EQ(n.readable_len, 8);
    CHECK_EQ(n.writable_len, 16);
    CHECK(memcmp(n.bytes, "question", 8) == 0);
    CHECK_EQ(*(unsigned char *)buffer_at(d, 100), PATTERN);
    CHECK_EQ(*(unsigned char *)buffer_at(d, 115), PATTERN);
    CHECK_EQ(*(unsigned char *)buffer_at(d, 116), 0);
    rig_close(&r);
}

static void a_chain_may_only_read_or_only_write(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    struct driver_ring *d = &r.ring;
    set_desc(d->desc, 0, buffer_addr(d, 0), 8, 0, 0);
    set_desc(d->desc, 1, buffer_addr(d, 0), 8, VRING_DESC_F_WRITE, 0);
    driver_send(d, 0);
    driver_send(d, 1);
    CHECK_EQ(driver_take(d).len, 0);
    CHECK_EQ(driver_take(d).len, 8);
    CHECK_EQ(probe_get(r.probe, 0).writable, 0);
    CHECK_EQ(probe_get(r.probe, 1).readable, 0);
    rig_close(&r);
}

/* Links descriptors first..first+n-1 of one byte each; the last one writable. */
static void link_chain(struct driver_ring *d, struct vring_desc *table, uint16_t first, uint16_t n)
{
    for (uint16_t i = 0; i < n; i++) {
        bool last = i == n - 1;
        set_desc(table, first + i, buffer_addr(d, i), 1,
                 last ? VRING_DESC_F_WRITE : VRING_DESC_F_NEXT, (uint16_t)(first + i + 1));
    }
}

static void a_chain_may_be_as_long_as_the_queue(void)
{
    struct rig r;

    rig_open(&r, 64, 0);
    link_chain(&r.ring, r.ring.desc, 0, 64);
    driver_send(&r.ring, 0);
    CHECK_EQ(driver_take(&r.ring).len, 1);
    CHECK_EQ(probe_get(r.probe, 0).readable, 63);
    rig_close(&r);
}

static void a_queue_of_one(void)
{
    struct rig r;

    rig_open(&r, 1, EVENT_IDX);
    set_desc(r.ring.desc, 0, buffer_addr(&r.ring, 0), 1, VRING_DESC_F_WRITE, 0);
    for (int i = 0; i < 10; i++) {
        driver_send(&r.ring, 0);
        CHECK_EQ(driver_take(&r.ring).id, 0);
    }
    rig_close(&r);
}

static void a_buffer_over_two_regions_is_split(void)
{
    struct rig r;
    uint64_t edge = AT_BUFFER + 0x1000;

    rig_open_at(&r, 8, 0, edge, 0, 0, 0);
    struct driver_ring *d = &r.ring;
    fill(d, 0x1000 - 4, "overedge");
    set_desc(d->desc, 0, GUEST_BASE + edge - 4, 8, VRING_DESC_F_NEXT, 1);
    set_desc(d->desc, 1, GUEST_BASE + edge - 1, 2, VRING_DESC_F_WRITE, 0);
    driver_send(d, 0);
    CHECK_EQ(driver_take(d).len, 2);
    struct note n = probe_get(r.probe, 0);
    CHECK_EQ(n.readable, 2);
    CHECK_EQ(n.writable, 2);
    CHECK_EQ(n.splits, 2);
    CHECK(memcmp(n.bytes, "overedge", 8) == 0);
    CHECK_EQ(*(unsigned char *)buffer_at(d, 0xfff), PATTERN);
    CHECK_EQ(*(unsigned char *)buffer_at(d, 0x1000), PATTERN);
    CHECK_EQ(*(unsigned char *)buffer_at(d, 0x1001), 'd');
    rig_close(&r);
}

static void the_last_byte_of_memory_is_legal(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    set_desc(r.ring.desc, 0, GUEST_BASE + GUEST_SIZE - 1, 1, VRING_DESC_F_WRITE, 0);
    set_desc(r.ring.desc, 1, GUEST_BASE, 1, 0, 0);
    driver_send(&r.ring, 0);
    CHECK_EQ(driver_take(&r.ring).len, 1);
    CHECK_EQ((unsigned char)r.guest.host[GUEST_SIZE - 1], PATTERN);
    driver_send(&r.ring, 1);
    CHECK_EQ(driver_take(&r.ring).id, 1);
    rig_close(&r);
}

/* ---- indirect ---- */

static void point_to_table(struct driver_ring *d, uint16_t head, uint64_t addr, uint32_t entries,
                           uint16_t flags)
{
    set_desc(d->desc, head, addr, 16 * entries, VRING_DESC_F_INDIRECT | flags, 0);
}

static void an_indirect_table_is_a_chain(void)
{
    struct rig r;

    rig_open(&r, 4, INDIRECT);
    struct driver_ring *d = &r.ring;
    fill(d, 0, "abc");
    link_chain(d, driver_table(d), 0, 4);
    point_to_table(d, 3, d->base + AT_TABLE, 4, 0);
    driver_send(d, 3);
    CHECK_EQ(driver_take(d).id, 3);
    struct note n = probe_get(r.probe, 0);
    CHECK_EQ(n.readable, 3);
    CHECK(memcmp(n.bytes, "abc", 3) == 0);
    rig_close(&r);
}

/* Virtio 1.3, section 2.7.5.3.2: the device ignores WRITE on the descriptor of a table. */
static void write_on_an_indirect_descriptor_is_ignored(void)
{
    struct rig r;

    rig_open(&r, 4, INDIRECT);
    link_chain(&r.ring, driver_table(&r.ring), 0, 2);
    point_to_table(&r.ring, 0, r.ring.base + AT_TABLE, 2, VRING_DESC_F_WRITE);
    driver_send(&r.ring, 0);
    CHECK_EQ(driver_take(&r.ring).len, 1);
    CHECK_EQ(probe_get(r.probe, 0).readable, 1);
    rig_close(&r);
}

static void an_indirect_table_may_lie_over_two_regions(void)
{
    struct rig r;
    uint64_t edge = AT_TABLE + 0x1000;

    rig_open_at(&r, 8, INDIRECT, edge, 0, 0, 0);
    struct driver_ring *d = &r.ring;
    /* 24 bytes before the edge: the second entry itself is cut in half. */
    struct vring_desc *table = guest_at(&r.guest, GUEST_BASE + edge - 24);
    fill(d, 0, "xyz");
    link_chain(d, table, 0, 4);
    point_to_table(d, 0, GUEST_BASE + edge - 24, 4, 0);
    driver_send(d, 0);
    CHECK_EQ(driver_take(d).len, 1);
    CHECK(memcmp(probe_get(r.probe, 0).bytes, "xyz", 3) == 0);
    rig_close(&r);
}

static void an_indirect_table_may_be_longer_than_the_queue(void)
{
    struct rig r;

    rig_open(&r, 4, INDIRECT);
    link_chain(&r.ring, driver_table(&r.ring), 0, PROBE_CHAIN_MAX);
    point_to_table(&r.ring, 0, r.ring.base + AT_TABLE, PROBE_CHAIN_MAX, 0);
    driver_send(&r.ring, 0);
    CHECK_EQ(driver_take(&r.ring).len, 1);
    CHECK_EQ(probe_get(r.probe, 0).readable, PROBE_CHAIN_MAX - 1);
    rig_close(&r);
}

/* ---- indexes ---- */

static void a_full_ring_across_the_wrap(void)
{
    struct rig r;

    rig_open_at(&r, 8, 0, 0, 0, 0, BEFORE_WRAP(8, 4));
    one_byte_each(&r.ring);
    for (uint16_t i = 0; i < 8; i++)
        driver_offer(&r.ring, i);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    for (uint16_t i = 0; i < 8; i++)
        CHECK_EQ(driver_take(&r.ring).id, i);
    rig_close(&r);
}

static void kicks_without_work_do_nothing(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    for (int i = 0; i < 1000; i++)
        driver_kick(&r.ring);
    queue_sync(&r.control, r.queue);
    CHECK_EQ(driver_used_idx(&r.ring), 0);
    driver_send(&r.ring, 3);
    CHECK_EQ(driver_take(&r.ring).id, 3);
    rig_close(&r);
}

/* ---- calls: device to driver ---- */

/* Sends one chain, waits for it and for the end of the device's pass; counts the calls. */
static uint64_t calls_of_one(struct rig *r)
{
    take_signals(r->ring.call);
    driver_send(&r->ring, 0);
    CHECK_EQ(driver_take(&r->ring).id, 0);
    queue_sync(&r->control, r->queue);
    return take_signals(r->ring.call);
}

static void a_driver_is_called_unless_it_asks_not_to_be(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    CHECK_EQ(calls_of_one(&r), 1);
    driver_want_calls(&r.ring, false);
    CHECK_EQ(calls_of_one(&r), 0);
    driver_want_calls(&r.ring, true);
    CHECK_EQ(calls_of_one(&r), 1);
    rig_close(&r);
}

static void with_event_idx_a_driver_is_called_when_its_event_is_passed(void)
{
    struct rig r;

    rig_open(&r, 8, EVENT_IDX);
    one_byte_each(&r.ring);
    driver_want_call_after(&r.ring, 2);
    CHECK_EQ(calls_of_one(&r), 0);
    CHECK_EQ(calls_of_one(&r), 0);
    CHECK_EQ(calls_of_one(&r), 1);
    CHECK_EQ(calls_of_one(&r), 0);
    driver_want_call_after(&r.ring, 0);
    CHECK_EQ(calls_of_one(&r), 1);
    rig_close(&r);
}

static void event_idx_works_across_the_wrap(void)
{
    struct rig r;

    rig_open_at(&r, 8, EVENT_IDX, 0, 0, 0, BEFORE_WRAP(8, 2));
    one_byte_each(&r.ring);
    driver_want_call_after(&r.ring, 2);
    CHECK_EQ(calls_of_one(&r), 0);
    CHECK_EQ(calls_of_one(&r), 0);
    CHECK_EQ(calls_of_one(&r), 1);
    CHECK_EQ(calls_of_one(&r), 0);
    rig_close(&r);
}

static void a_batch_is_one_call(void)
{
    struct rig r;

    rig_open(&r, 64, 0);
    one_byte_each(&r.ring);
    r.probe->hold = true;
    for (uint16_t i = 0; i < 64; i++)
        driver_offer(&r.ring, i);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    while (probe_count(r.probe) < 64)
        queue_sync(&r.control, r.queue);
    take_signals(r.ring.call);
    eventfd_write(r.probe->release, 1);
    driver_await_used(&r.ring, 64);
    queue_sync(&r.control, r.queue);
    CHECK_EQ(take_signals(r.ring.call), 1);
    struct vhost_stats stats;
    CHECK_EQ(vhost_device_read_stats(&r.probe->device, 0, &stats), 0);
    CHECK(stats.counter[VHOST_COUNTER_CALLS] >= 1);
    rig_close(&r);
}

/* ---- kicks: driver to device ---- */

static void without_event_idx_a_sleeping_device_wants_kicks(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    for (int i = 0; i < 3; i++) {
        driver_send(&r.ring, 0);
        CHECK_EQ(driver_take(&r.ring).id, 0);
        while (!driver_is_kick_wanted(&r.ring))
            queue_sync(&r.control, r.queue);
    }
    rig_close(&r);
}

static void with_event_idx_a_sleeping_device_wants_the_next_kick(void)
{
    struct rig r;

    rig_open(&r, 8, EVENT_IDX);
    one_byte_each(&r.ring);
    for (int i = 0; i < 3; i++) {
        driver_send(&r.ring, 0);
        CHECK_EQ(driver_take(&r.ring).id, 0);
        while (!driver_is_kick_wanted(&r.ring))
            queue_sync(&r.control, r.queue);
    }
    if (!LAYOUT)
        CHECK_EQ(driver_used_flags(&r.ring), 0); /* must be 0 with EVENT_IDX (section 2.7.10) */
    rig_close(&r);
}

static void a_polling_device_wants_no_kicks(void)
{
    struct rig r;

    rig_open_at(&r, 8, 0, 0, VHOST_IOTHREAD_POLL_ALWAYS, 0, 0);
    one_byte_each(&r.ring);
    for (int i = 0; i < 100; i++) {
        driver_offer(&r.ring, 0);
        driver_publish(&r.ring); /* and no kick */
        CHECK_EQ(driver_take(&r.ring).id, 0);
        CHECK(!driver_is_kick_wanted(&r.ring));
    }
    rig_close(&r);
}

static void a_polling_device_wants_no_kicks_with_event_idx(void)
{
    struct rig r;

    rig_open_at(&r, 8, EVENT_IDX, 0, VHOST_IOTHREAD_POLL_ALWAYS, 0, 0);
    one_byte_each(&r.ring);
    driver_offer(&r.ring, 0);
    driver_publish(&r.ring);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    for (int i = 0; i < 100; i++) {
        driver_offer(&r.ring, 0);
        driver_publish(&r.ring);
        CHECK_EQ(driver_take(&r.ring).id, 0);
        CHECK(!driver_is_kick_wanted(&r.ring));
    }
    rig_close(&r);
}

#define RING_CASES                                                                                 \
    TEST(a_chain_arrives_and_returns), TEST(a_chain_may_only_read_or_only_write),                  \
        TEST(a_chain_may_be_as_long_as_the_queue), TEST(a_queue_of_one),                           \
        TEST(a_buffer_over_two_regions_is_split), TEST(the_last_byte_of_memory_is_legal),          \
        TEST(an_indirect_table_is_a_chain), TEST(write_on_an_indirect_descriptor_is_ignored),      \
        TEST(an_indirect_table_may_lie_over_two_regions),                                          \
        TEST(an_indirect_table_may_be_longer_than_the_queue), TEST(a_full_ring_across_the_wrap),   \
        TEST(kicks_without_work_do_nothing), TEST(a_driver_is_called_unless_it_asks_not_to_be),    \
        TEST(with_event_idx_a_driver_is_called_when_its_event_is_passed),                          \
        TEST(event_idx_works_across_the_wrap), TEST(a_batch_is_one_call),                          \
        TEST(without_event_idx_a_sleeping_device_wants_kicks),                                     \
        TEST(with_event_idx_a_sleeping_device_wants_the_next_kick),                                \
        TEST(a_polling_device_wants_no_kicks),                                                     \
        TEST(a_polling_device_wants_no_kicks_with_event_idx)

#endif
