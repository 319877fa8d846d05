/* The packed ring where the driver breaks the rules; see test_fault.c. */
#define PACKED_RINGS
#include "street.h"

enum {
    NEXT = VRING_DESC_F_NEXT,
    WRITE = VRING_DESC_F_WRITE,
    INDIRECT_FLAG = VRING_DESC_F_INDIRECT
};

/* The next descriptor: one byte for the device to write, unless `flags` say otherwise. */
static void put(struct driver_ring *d, uint16_t id, uint16_t flags)
{
    packed_put(d->packed, buffer_addr(d, 0), 1, id, flags);
    if (id < d->size)
        d->packed->length[id] = 1;
}

static void send_one(struct driver_ring *d, uint16_t id)
{
    put(d, id, WRITE);
    driver_publish(d);
    driver_kick(d);
}

/* ---- ids ---- */

static void an_id_outside_the_ring(void)
{
    const uint16_t wrong[] = {8, 0x7fff, 0xffff};

    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        struct street s;
        street_open(&s, 8, 0);
        put(&s.rig.ring, wrong[i], WRITE);
        expect_fault(&s, VHOST_FAULT_HEAD_RANGE);
    }
}

static void an_id_that_is_in_flight(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    r.probe->hold = true;
    put(&r.ring, 3, WRITE);
    put(&r.ring, 3, WRITE);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_HEAD_BUSY);
    /* What was in flight is still completed, exactly once. */
    eventfd_write(r.probe->release, 1);
    CHECK_EQ(driver_take(&r.ring).id, 3);
    CHECK_EQ(queue_halt(&r.control, r.queue), 0x80018001);
    CHECK_EQ(driver_used_idx(&r.ring), 1);
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

/* ---- chains ---- */

static void next_for_ever(void)
{
    struct street s;

    street_open(&s, 8, 0);
    for (uint16_t i = 0; i < 8; i++)
        put(&s.rig.ring, i, NEXT);
    expect_fault(&s, VHOST_FAULT_CHAIN_LENGTH);
}

/* A chain may be as long as what is not in flight, and no longer. */
static void a_chain_over_others_in_flight(void)
{
    struct street s;

    street_open(&s, 8, 0);
    s.rig.probe->hold = true;
    send_one(&s.rig.ring, 0);
    send_one(&s.rig.ring, 1);
    while (probe_count(s.rig.probe) < 2)
        queue_sync(&s.rig.control, s.rig.queue);
    for (uint16_t i = 0; i < 6; i++)
        put(&s.rig.ring, 2, NEXT);
    put(&s.rig.ring, 3, WRITE);
    /* The place of the first chain has been written over; its completion needs nothing of it. */
    driver_publish(&s.rig.ring);
    driver_kick(&s.rig.ring);
    CHECK_EQ(rig_await_fault(&s.rig), VHOST_FAULT_CHAIN_LENGTH);
    eventfd_write(s.rig.probe->release, 1);
    CHECK_EQ(driver_take(&s.rig.ring).id, 0);
    CHECK_EQ(driver_take(&s.rig.ring).id, 1);
    street_close(&s);
}

/* All that there is is in flight, and some of it is made available once more. */
static void more_than_the_ring_is_available(void)
{
    struct street s;

    street_open(&s, 4, 0);
    s.rig.probe->hold = true;
    for (uint16_t i = 0; i < 4; i++)
        send_one(&s.rig.ring, i);
    while (probe_count(s.rig.probe) < 4)
        queue_sync(&s.rig.control, s.rig.queue);
    send_one(&s.rig.ring, 0);
    CHECK_EQ(rig_await_fault(&s.rig), VHOST_FAULT_CHAIN_LENGTH);
    eventfd_write(s.rig.probe->release, 1);
    for (uint16_t i = 0; i < 4; i++)
        CHECK_EQ(driver_take(&s.rig.ring).id, i);
    street_close(&s);
}

static void a_readable_buffer_after_a_writable_one(void)
{
    struct street s;

    street_open(&s, 8, 0);
    put(&s.rig.ring, 0, WRITE | NEXT);
    put(&s.rig.ring, 0, 0);
    expect_fault(&s, VHOST_FAULT_ORDER);
}

static void expect_buffer_fault(uint64_t addr, uint32_t len, enum vhost_fault fault)
{
    struct street s;

    street_open(&s, 8, 0);
    packed_put(s.rig.ring.packed, addr, len, 0, WRITE);
    expect_fault(&s, fault);
}

static void a_buffer_that_is_none(void)
{
    expect_buffer_fault(GUEST_BASE, 0, VHOST_FAULT_LENGTH);
    expect_buffer_fault(0, 1, VHOST_FAULT_ADDRESS);
    expect_buffer_fault(GUEST_BASE + GUEST_SIZE - 1, 2, VHOST_FAULT_ADDRESS);
    expect_buffer_fault(UINT64_MAX - 3, 8, VHOST_FAULT_ADDRESS);
    expect_buffer_fault(GUEST_BASE, UINT32_MAX, VHOST_FAULT_ADDRESS);
}

/* ---- what looks available and is not ---- */

static void expect_nothing(uint16_t flags)
{
    struct rig r;

    rig_open(&r, 8, 0);
    r.ring.packed->slot[0] = (struct vring_packed_desc){buffer_addr(&r.ring, 0), 1, 0, flags};
    driver_kick(&r.ring);
    queue_sync(&r.control, r.queue);
    CHECK_EQ(probe_count(r.probe), 0);
    r.ring.packed->slot[0].flags = 0;
    send_one(&r.ring, 5);
    CHECK_EQ(driver_take(&r.ring).id, 5);
    rig_close(&r);
}

static void flags_of_another_round_say_nothing(void)
{
    expect_nothing(WRITE | AVAIL | USED);
    expect_nothing(WRITE | USED);
    expect_nothing(WRITE);
}

/* ---- indirect tables ---- */

static void expect_table_fault(uint64_t features, uint64_t addr, uint32_t len, uint16_t flags,
                               enum vhost_fault fault)
{
    struct street s;

    street_open(&s, 8, features);
    struct driver_ring *d = &s.rig.ring;
    struct vring_packed_desc *table = (struct vring_packed_desc *)driver_table(d);
    for (int i = 0; i < 64; i++)
        table[i] = (struct vring_packed_desc){buffer_addr(d, 0), 1, 0, WRITE};
    packed_put(d->packed, addr, len, 0, INDIRECT_FLAG | flags);
    put(d, 0, WRITE);
    expect_fault(&s, fault);
}

static void a_table_that_is_none(void)
{
    const uint64_t at = GUEST_BASE + AT_TABLE;

    expect_table_fault(0, at, 16, 0, VHOST_FAULT_INDIRECT);
    expect_table_fault(INDIRECT, at, 16, NEXT, VHOST_FAULT_INDIRECT);
    expect_table_fault(INDIRECT, at, 0, 0, VHOST_FAULT_INDIRECT);
    expect_table_fault(INDIRECT, at, 15, 0, VHOST_FAULT_INDIRECT);
    expect_table_fault(INDIRECT, at, 24, 0, VHOST_FAULT_INDIRECT);
    expect_table_fault(INDIRECT, at, 16 * (PROBE_CHAIN_MAX + 1), 0, VHOST_FAULT_CHAIN_LENGTH);
    expect_table_fault(INDIRECT, at, 0xfffffff0, 0, VHOST_FAULT_CHAIN_LENGTH);
    expect_table_fault(INDIRECT, 0, 16, 0, VHOST_FAULT_ADDRESS);
    expect_table_fault(INDIRECT, GUEST_BASE + GUEST_SIZE - 16, 32, 0, VHOST_FAULT_ADDRESS);
    expect_table_fault(INDIRECT, UINT64_MAX - 15, 32, 0, VHOST_FAULT_ADDRESS);
}

static void a_table_at_the_end_of_a_list(void)
{
    struct street s;

    street_open(&s, 8, INDIRECT);
    put(&s.rig.ring, 0, NEXT);
    packed_put(s.rig.ring.packed, GUEST_BASE + AT_TABLE, 16, 0, INDIRECT_FLAG);
    expect_fault(&s, VHOST_FAULT_INDIRECT);
}

static void a_table_in_a_table(void)
{
    struct street s;

    street_open(&s, 8, INDIRECT);
    struct driver_ring *d = &s.rig.ring;
    struct vring_packed_desc *table = (struct vring_packed_desc *)driver_table(d);
    table[0] = (struct vring_packed_desc){d->base + AT_TABLE, 16, 0, INDIRECT_FLAG};
    packed_put(d->packed, d->base + AT_TABLE, 16, 0, INDIRECT_FLAG);
    expect_fault(&s, VHOST_FAULT_INDIRECT);
}

/* ---- wishes ---- */

/* The chain is used, and then the driver's wish is found to be none. */
static void expect_wish_fault(uint64_t features, uint16_t off_wrap, uint16_t flags)
{
    struct street s;

    street_open(&s, 8, features);
    *s.rig.ring.packed->driver_event =
        (struct vring_packed_desc_event){.off_wrap = off_wrap, .flags = flags};
    send_one(&s.rig.ring, 0);
    CHECK_EQ(rig_await_fault(&s.rig), VHOST_FAULT_EVENT);
    CHECK_EQ(driver_take(&s.rig.ring).id, 0);
    CHECK_EQ(take_signals(s.rig.ring.call), 0);
    street_close(&s);
}

static void a_wish_that_is_none(void)
{
    expect_wish_fault(0, 0, VRING_PACKED_EVENT_FLAG_DESC);
    expect_wish_fault(EVENT_IDX, 8, VRING_PACKED_EVENT_FLAG_DESC);
    expect_wish_fault(EVENT_IDX, 0xffff, VRING_PACKED_EVENT_FLAG_DESC);
    expect_wish_fault(EVENT_IDX, 0, 3);
    expect_wish_fault(0, 0, 0xffff);
}

/* ---- time of check, time of use: run under the sanitizers this would show a second read ---- */

struct scribbler {
    struct driver_ring *d;
    atomic_bool stop;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    struct driver_ring *d = s->d;

    for (unsigned i = 0; !atomic_load(&s->stop); i++) {
        volatile struct vring_packed_desc *slot = &d->packed->slot[i % 8];
        slot->len = i % 3 ? 64 : UINT32_MAX;
        slot->addr = i % 5 ? buffer_addr(d, 0) : UINT64_MAX - 8;
        slot->id = i % 13 ? i % 8 : 0x7fff;
        slot->flags = (uint16_t)((i % 11 ? WRITE : NEXT) | (i / 8 % 2 ? AVAIL : USED));
    }
    return NULL;
}

static void descriptors_rewritten_while_they_are_read(void)
{
    for (int round = 0; round < 50; round++) {
        struct rig r;
        pthread_t thread;

        rig_open(&r, 8, 0);
        struct scribbler s = {.d = &r.ring};
        CHECK_EQ(pthread_create(&thread, NULL, scribble, &s), 0);
        for (int i = 0; i < 200 && !take_signals(r.ring.err); i++) {
            driver_kick(&r.ring);
            queue_sync(&r.control, r.queue);
        }
        atomic_store(&s.stop, true);
        pthread_join(thread, NULL);
        rig_close(&r);
    }
}

static const struct test tests[] = {
    TEST(an_id_outside_the_ring),
    TEST(an_id_that_is_in_flight),
    TEST(next_for_ever),
    TEST(a_chain_over_others_in_flight),
    TEST(more_than_the_ring_is_available),
    TEST(a_readable_buffer_after_a_writable_one),
    TEST(a_buffer_that_is_none),
    TEST(flags_of_another_round_say_nothing),
    TEST(a_table_that_is_none),
    TEST(a_table_at_the_end_of_a_list),
    TEST(a_table_in_a_table),
    TEST(a_wish_that_is_none),
    TEST(descriptors_rewritten_while_they_are_read),
};
MAIN(tests)
