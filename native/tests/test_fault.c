/*
 * The split ring where the driver breaks the rules.  Each fault breaks its own ring under its
 * own name, is told by the err fd and one event, and leaves the iothread and other rings alone.
 */
#include "street.h"

static void one_byte(struct driver_ring *d, uint16_t head, uint16_t flags, uint16_t next)
{
    set_desc(d->desc, head, buffer_addr(d, head), 1, flags, next);
}

/* ---- indexes and heads ---- */

static void avail_index_runs_ahead(void)
{
    struct street s;

    street_open(&s, 8, 0);
    s.rig.ring.avail_idx = 9;
    expect_fault(&s, VHOST_FAULT_AVAIL_INDEX);
}

static void avail_index_goes_back(void)
{
    struct street s;

    street_open(&s, 8, 0);
    one_byte(&s.rig.ring, 0, VRING_DESC_F_WRITE, 0);
    driver_send(&s.rig.ring, 0);
    driver_take(&s.rig.ring);
    s.rig.ring.avail_idx = 0;
    expect_fault(&s, VHOST_FAULT_AVAIL_INDEX);
}

static void head_outside_the_table(void)
{
    struct street s;

    street_open(&s, 8, 0);
    driver_offer(&s.rig.ring, 8);
    expect_fault(&s, VHOST_FAULT_HEAD_RANGE);
}

static void head_of_65535(void)
{
    struct street s;

    street_open(&s, 8, 0);
    driver_offer(&s.rig.ring, 65535);
    expect_fault(&s, VHOST_FAULT_HEAD_RANGE);
}

static void the_same_head_twice_in_flight(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    r.probe->hold = true;
    one_byte(&r.ring, 3, VRING_DESC_F_WRITE, 0);
    driver_offer(&r.ring, 3);
    driver_offer(&r.ring, 3);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_HEAD_BUSY);
    /* What was in flight is still completed, exactly once. */
    eventfd_write(r.probe->release, 1);
    CHECK_EQ(driver_take(&r.ring).id, 3);
    CHECK_EQ(queue_halt(&r.control, r.queue), 1);
    CHECK_EQ(driver_used_idx(&r.ring), 1);
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

static void the_same_head_twice_one_after_the_other_is_legal(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte(&r.ring, 3, VRING_DESC_F_WRITE, 0);
    driver_offer(&r.ring, 3);
    driver_offer(&r.ring, 3);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    CHECK_EQ(driver_take(&r.ring).id, 3);
    CHECK_EQ(driver_take(&r.ring).id, 3);
    rig_close(&r);
}

/* ---- chains ---- */

static void a_chain_that_loops(void)
{
    struct street s;

    street_open(&s, 8, 0);
    one_byte(&s.rig.ring, 0, VRING_DESC_F_NEXT, 1);
    one_byte(&s.rig.ring, 1, VRING_DESC_F_NEXT, 0);
    driver_offer(&s.rig.ring, 0);
    expect_fault(&s, VHOST_FAULT_CHAIN_LENGTH);
}

static void a_descriptor_that_is_its_own_next(void)
{
    struct street s;

    street_open(&s, 8, 0);
    one_byte(&s.rig.ring, 0, VRING_DESC_F_NEXT, 0);
    driver_offer(&s.rig.ring, 0);
    expect_fault(&s, VHOST_FAULT_CHAIN_LENGTH);
}

/* All descriptors of the queue and one of them again, which then ends the chain. */
static void a_chain_of_the_queue_size_and_one(void)
{
    struct street s;

    street_open(&s, 8, 0);
    for (uint16_t i = 0; i < 8; i++)
        one_byte(&s.rig.ring, i, VRING_DESC_F_NEXT, (i + 1) % 8);
    driver_offer(&s.rig.ring, 0);
    expect_fault(&s, VHOST_FAULT_CHAIN_LENGTH);
}

static void next_outside_the_table(void)
{
    struct street s;

    street_open(&s, 8, 0);
    one_byte(&s.rig.ring, 0, VRING_DESC_F_NEXT, 8);
    driver_offer(&s.rig.ring, 0);
    expect_fault(&s, VHOST_FAULT_NEXT_RANGE);
}

static void readable_after_writable(void)
{
    struct street s;

    street_open(&s, 8, 0);
    one_byte(&s.rig.ring, 0, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 1);
    one_byte(&s.rig.ring, 1, 0, 0);
    driver_offer(&s.rig.ring, 0);
    expect_fault(&s, VHOST_FAULT_ORDER);
}

static void expect_buffer_fault(uint64_t addr, uint32_t len, enum vhost_fault fault)
{
    struct street s;

    street_open(&s, 8, 0);
    set_desc(s.rig.ring.desc, 0, addr, len, VRING_DESC_F_WRITE, 0);
    driver_offer(&s.rig.ring, 0);
    expect_fault(&s, fault);
}

static void a_zero_length_descriptor(void)
{
    expect_buffer_fault(GUEST_BASE, 0, VHOST_FAULT_LENGTH);
}

static void a_buffer_at_address_zero_that_is_not_mapped(void)
{
    expect_buffer_fault(0, 16, VHOST_FAULT_ADDRESS);
}

static void a_buffer_beyond_memory(void)
{
    expect_buffer_fault(GUEST_BASE + GUEST_SIZE, 1, VHOST_FAULT_ADDRESS);
}

static void a_buffer_whose_end_is_beyond_memory(void)
{
    expect_buffer_fault(GUEST_BASE + GUEST_SIZE - 8, 9, VHOST_FAULT_ADDRESS);
}

static void a_buffer_that_begins_before_memory(void)
{
    expect_buffer_fault(GUEST_BASE - 1, 2, VHOST_FAULT_ADDRESS);
}

static void a_buffer_that_wraps(void)
{
    expect_buffer_fault(UINT64_MAX - 7, 16, VHOST_FAULT_ADDRESS);
}

static void a_buffer_of_4_gib(void)
{
    expect_buffer_fault(GUEST_BASE, UINT32_MAX, VHOST_FAULT_ADDRESS);
}

/* Each buffer is legal; used.len could not tell their sum (virtio 1.3, section 2.7.5.2). */
static void a_chain_of_4_gib(void)
{
    enum { N = 8, MIB = 1 << 20 };
    struct rig r = {.guest = guest_new((uint64_t)512 * MIB + MIB, 0)};

    r.ring = driver_new(&r.guest, 0, N, VERSION_1, 0);
    r.control = control_new(0, 0);
    r.probe = probe_new(1);
    struct vhost_queue_config config = driver_config(&r.ring, 0);
    CHECK_EQ(vhost_queue_new(&config, &r.probe->device, r.guest.memory, &r.queue), 0);
    queue_run(&r.control, r.queue);
    for (uint16_t i = 0; i < N; i++)
        set_desc(r.ring.desc, i, GUEST_BASE, 512 * MIB,
                 (i < N - 1 ? VRING_DESC_F_NEXT : 0) | VRING_DESC_F_WRITE, i + 1);
    driver_send(&r.ring, 0);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_LENGTH);
    CHECK_EQ(probe_count(r.probe), 0);
    rig_close(&r);
}

/* ---- indirect tables ---- */

static void table_at(struct driver_ring *d, uint16_t head, uint64_t addr, uint32_t len,
                     uint16_t flags)
{
    set_desc(d->desc, head, addr, len, VRING_DESC_F_INDIRECT | flags, 1);
}

static void expect_table_fault(uint64_t features, uint64_t addr, uint32_t len, uint16_t flags,
                               enum vhost_fault fault)
{
    struct street s;

    street_open(&s, 8, features);
    struct driver_ring *d = &s.rig.ring;
    set_desc(driver_table(d), 0, buffer_addr(d, 0), 1, VRING_DESC_F_WRITE, 0);
    one_byte(d, 1, 0, 0);
    table_at(d, 0, addr, len, flags);
    driver_offer(d, 0);
    expect_fault(&s, fault);
}

static void indirect_not_negotiated(void)
{
    expect_table_fault(0, GUEST_BASE + AT_TABLE, 16, 0, VHOST_FAULT_INDIRECT);
}

static void indirect_with_next(void)
{
    expect_table_fault(INDIRECT, GUEST_BASE + AT_TABLE, 16, VRING_DESC_F_NEXT,
                       VHOST_FAULT_INDIRECT);
}

static void an_indirect_table_of_length_zero(void)
{
    expect_table_fault(INDIRECT, GUEST_BASE + AT_TABLE, 0, 0, VHOST_FAULT_INDIRECT);
}

static void an_indirect_table_of_17_bytes(void)
{
    expect_table_fault(INDIRECT, GUEST_BASE + AT_TABLE, 17, 0, VHOST_FAULT_INDIRECT);
}

static void an_indirect_table_outside_memory(void)
{
    expect_table_fault(INDIRECT, 0, 16, 0, VHOST_FAULT_ADDRESS);
}

static void an_indirect_table_that_ends_outside_memory(void)
{
    expect_table_fault(INDIRECT, GUEST_BASE + GUEST_SIZE - 16, 32, 0, VHOST_FAULT_ADDRESS);
}

static void an_indirect_table_that_wraps(void)
{
    expect_table_fault(INDIRECT, UINT64_MAX - 15, 32, 0, VHOST_FAULT_ADDRESS);
}

static void an_indirect_table_in_an_indirect_table(void)
{
    struct street s;

    street_open(&s, 8, INDIRECT);
    struct driver_ring *d = &s.rig.ring;
    set_desc(driver_table(d), 0, d->base + AT_TABLE, 16, VRING_DESC_F_INDIRECT, 0);
    table_at(d, 0, d->base + AT_TABLE, 16, 0);
    driver_offer(d, 0);
    expect_fault(&s, VHOST_FAULT_INDIRECT);
}

static void next_outside_the_indirect_table(void)
{
    struct street s;

    street_open(&s, 8, INDIRECT);
    struct driver_ring *d = &s.rig.ring;
    set_desc(driver_table(d), 0, buffer_addr(d, 0), 1, VRING_DESC_F_NEXT, 2);
    set_desc(driver_table(d), 1, buffer_addr(d, 0), 1, 0, 0);
    table_at(d, 0, d->base + AT_TABLE, 32, 0);
    driver_offer(d, 0);
    expect_fault(&s, VHOST_FAULT_NEXT_RANGE);
}

static void an_indirect_table_that_loops(void)
{
    struct street s;

    street_open(&s, 8, INDIRECT);
    struct driver_ring *d = &s.rig.ring;
    set_desc(driver_table(d), 0, buffer_addr(d, 0), 1, VRING_DESC_F_NEXT, 1);
    set_desc(driver_table(d), 1, buffer_addr(d, 0), 1, VRING_DESC_F_NEXT, 0);
    table_at(d, 0, d->base + AT_TABLE, 32, 0);
    driver_offer(d, 0);
    expect_fault(&s, VHOST_FAULT_CHAIN_LENGTH);
}

static void an_indirect_chain_longer_than_the_device_takes(void)
{
    struct street s;

    street_open(&s, 8, INDIRECT);
    struct driver_ring *d = &s.rig.ring;
    for (uint16_t i = 0; i <= PROBE_CHAIN_MAX; i++)
        set_desc(driver_table(d), i, buffer_addr(d, i), 1,
                 i < PROBE_CHAIN_MAX ? VRING_DESC_F_NEXT : 0, i + 1);
    table_at(d, 0, d->base + AT_TABLE, 16 * (PROBE_CHAIN_MAX + 1), 0);
    driver_offer(d, 0);
    expect_fault(&s, VHOST_FAULT_CHAIN_LENGTH);
}

static const struct test tests[] = {
    TEST(avail_index_runs_ahead),
    TEST(avail_index_goes_back),
    TEST(head_outside_the_table),
    TEST(head_of_65535),
    TEST(the_same_head_twice_in_flight),
    TEST(the_same_head_twice_one_after_the_other_is_legal),
    TEST(a_chain_that_loops),
    TEST(a_descriptor_that_is_its_own_next),
    TEST(a_chain_of_the_queue_size_and_one),
    TEST(next_outside_the_table),
    TEST(readable_after_writable),
    TEST(a_zero_length_descriptor),
    TEST(a_buffer_at_address_zero_that_is_not_mapped),
    TEST(a_buffer_beyond_memory),
    TEST(a_buffer_whose_end_is_beyond_memory),
    TEST(a_buffer_that_begins_before_memory),
    TEST(a_buffer_that_wraps),
    TEST(a_buffer_of_4_gib),
    TEST(a_chain_of_4_gib),
    TEST(indirect_not_negotiated),
    TEST(indirect_with_next),
    TEST(an_indirect_table_of_length_zero),
    TEST(an_indirect_table_of_17_bytes),
    TEST(an_indirect_table_outside_memory),
    TEST(an_indirect_table_that_ends_outside_memory),
    TEST(an_indirect_table_that_wraps),
    TEST(an_indirect_table_in_an_indirect_table),
    TEST(next_outside_the_indirect_table),
    TEST(an_indirect_table_that_loops),
    TEST(an_indirect_chain_longer_than_the_device_takes),
};
MAIN(tests)
