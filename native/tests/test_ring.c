/* The split ring where the driver keeps the rules. */
#include "ring_cases.h"

static void a_chain_may_end_in_an_indirect_table(void)
{
    struct rig r;

    rig_open(&r, 4, INDIRECT);
    struct driver_ring *d = &r.ring;
    fill(d, 10, "0");
    fill(d, 0, "123");
    set_desc(d->desc, 0, buffer_addr(d, 10), 1, VRING_DESC_F_NEXT, 1);
    link_chain(d, driver_table(d), 0, 4);
    point_to_table(d, 1, d->base + AT_TABLE, 4, 0);
    driver_send(d, 0);
    CHECK_EQ(driver_take(d).id, 0);
    CHECK(memcmp(probe_get(r.probe, 0).bytes, "0123", 4) == 0);
    rig_close(&r);
}

static void indexes_wrap_at_65536(void)
{
    struct rig r;

    rig_open_at(&r, 8, EVENT_IDX, 0, 0, 0, 65533);
    one_byte_each(&r.ring);
    for (uint16_t i = 0; i < 40; i++) {
        driver_send(&r.ring, i % 8);
        CHECK_EQ(driver_take(&r.ring).id, i % 8);
    }
    CHECK_EQ(driver_used_idx(&r.ring), (uint16_t)(65533 + 40));
    CHECK_EQ(queue_halt(&r.control, r.queue), (uint16_t)(65533 + 40));
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

static void avail_flags_have_no_meaning_with_event_idx(void)
{
    struct rig r;

    rig_open(&r, 8, EVENT_IDX);
    one_byte_each(&r.ring);
    driver_want_calls(&r.ring, false);
    driver_want_call_after(&r.ring, 0);
    CHECK_EQ(calls_of_one(&r), 1);
    rig_close(&r);
}

static const struct test tests[] = {
    RING_CASES,
    TEST(a_chain_may_end_in_an_indirect_table),
    TEST(indexes_wrap_at_65536),
    TEST(avail_flags_have_no_meaning_with_event_idx),
};
MAIN(tests)
