/* Batches whose queue stops: nothing hangs, nothing is lost, nothing is done twice. */
#include "desk.h"

static void what_nobody_took_goes_back_into_the_ring(void)
{
    struct desk d;

    desk_open(&d, 8, EVENT_IDX, 0);
    offer(&d, 0, 5);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, 1), 1);
    CHECK_EQ(complete(&d, 0, 1), 0);
    driver_await_used(&d.ring, 1);
    CHECK_EQ(queue_halt(&d.control, d.queue), driver_next_index(&d.ring, 1));
    CHECK_EQ(driver_used_idx(&d.ring), 1);
    CHECK_EQ(take(&d, CHAINS), 0);
    queue_run(&d.control, d.queue);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 4);
    CHECK_EQ(d.chain[0].id, 1);
    CHECK_EQ(d.chain[3].id, 4);
    for (uint32_t i = 0; i < 4; i++)
        CHECK_EQ(complete(&d, d.chain[i].id, 1), 0);
    driver_await_used(&d.ring, 5);
    desk_close(&d);
}

static void a_stop_waits_for_what_was_taken(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    offer_and_take(&d, 0, 2);
    CHECK_EQ(vhost_queue_stop(d.queue, 77), 0);
    await_told(&d, VHOST_EVENT_RECALL);
    CHECK_EQ(complete(&d, 1, 1), 0);
    CHECK_EQ(driver_take(&d.ring).id, 1);
    CHECK_EQ(vhost_queue_free(d.queue), -EBUSY);
    CHECK_EQ(complete(&d, 0, 1), 0);
    CHECK_EQ(await_event(&d.control, VHOST_EVENT_DONE, 77).value, driver_next_index(&d.ring, 2));
    CHECK_EQ(driver_take(&d.ring).id, 0);
    queue_run(&d.control, d.queue);
    desk_close(&d);
}

static void what_is_given_back_is_unpopped(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    offer_and_take(&d, 0, 3);
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 0), 0); /* before the stop */
    CHECK_EQ(vhost_queue_stop(d.queue, 77), 0);
    await_told(&d, VHOST_EVENT_RECALL);
    CHECK_EQ(take(&d, CHAINS), 0); /* it is on its way back */
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 2), 0);
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 1), 0);
    CHECK_EQ(await_event(&d.control, VHOST_EVENT_DONE, 77).value, driver_next_index(&d.ring, 0));
    CHECK_EQ(driver_used_idx(&d.ring), 0);
    queue_run(&d.control, d.queue);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 3);
    for (uint32_t i = 0; i < 3; i++) {
        CHECK_EQ(d.chain[i].id, i);
        CHECK_EQ(complete(&d, i, 1), 0);
    }
    driver_await_used(&d.ring, 3);
    desk_close(&d);
}

static void what_was_overtaken_is_completed_empty(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    offer_and_take(&d, 0, 4);
    CHECK_EQ(complete(&d, 2, 1), 0);
    CHECK_EQ(driver_take(&d.ring).id, 2);
    for (uint32_t id = 0; id < 4; id++) {
        if (id != 2)
            CHECK_EQ(vhost_batch_give_back(d.device, 0, id), 0);
    }
    CHECK_EQ(queue_halt(&d.control, d.queue), driver_next_index(&d.ring, 3));
    for (uint32_t id = 0; id < 2; id++) {
        struct vring_used_elem used = driver_take(&d.ring);
        CHECK_EQ(used.id, id);
        CHECK_EQ(used.len, 0);
    }
    CHECK_EQ(driver_used_idx(&d.ring), 3);
    queue_run(&d.control, d.queue);
    desk_close(&d);
}

static void new_memory_waits_for_chains_in_the_old(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    struct vhost_memory *other = guest_map(d.guest.fd, d.guest.size, 0);
    offer_and_take(&d, 0, 2);
    const char *old = d.chain[1].buffers[0].base;
    CHECK_EQ(vhost_queue_set_memory(d.queue, other, 78), 0);
    await_told(&d, VHOST_EVENT_RECALL);
    CHECK_EQ(complete(&d, 0, 1), 0);
    CHECK_EQ(vhost_batch_give_back(d.device, 0, 1), 0);
    CHECK_EQ(await_event(&d.control, VHOST_EVENT_DONE, 78).result, 0);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 1);
    CHECK_EQ(d.chain[0].id, 1);
    CHECK(d.chain[0].buffers[0].base != old);
    CHECK_EQ(complete(&d, 1, 1), 0);
    driver_await_used(&d.ring, 2);
    vhost_memory_unref(other);
    desk_close(&d);
}

static void a_broken_ring_gets_its_chains_back(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    offer_and_take(&d, 0, 2);
    driver_send_empty(&d.ring, 7);
    CHECK_EQ(await_event(&d.control, VHOST_EVENT_BROKEN, 1000).value, VHOST_FAULT_LENGTH);
    CHECK_EQ(complete(&d, 1, 1), 0);
    CHECK_EQ(vhost_queue_stop(d.queue, 77), 0);
    await_told(&d, VHOST_EVENT_RECALL);
    CHECK_EQ(complete(&d, 0, 1), 0);
    CHECK_EQ(await_event(&d.control, VHOST_EVENT_DONE, 77).result, 0);
    CHECK_EQ(driver_used_idx(&d.ring), 2);
    queue_run(&d.control, d.queue);
    desk_close(&d);
}

static void a_disabled_queue_keeps_nothing(void)
{
    struct desk d;

    desk_open(&d, 8, 0, 0);
    offer(&d, 0, 2);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(vhost_queue_set_enabled(d.queue, false, ++d.control.token), 0);
    CHECK_EQ(await_done(&d.control).result, 0);
    CHECK_EQ(take(&d, CHAINS), 0);
    queue_sync(&d.control, d.queue); /* enables */
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 2);
    CHECK_EQ(complete(&d, 0, 1), 0);
    CHECK_EQ(complete(&d, 1, 1), 0);
    driver_await_used(&d.ring, 2);
    desk_close(&d);
}

/* A device that completes, gives back and is stopped as chance has it loses and doubles nothing. */
static void nothing_is_lost_by_chance(void)
{
    struct desk d;
    uint64_t offered[16] = {0}, used[16] = {0};
    uint32_t chance = 1, held[16], num_held = 0;
    bool out[16] = {0};

    desk_open(&d, 16, EVENT_IDX, 0);
    for (uint32_t turn = 0; turn < 4000; turn++) {
        chance = chance * 1103515245 + 12345;
        uint32_t pick = chance >> 16;
        for (uint16_t head = 0; head < 16; head++) {
            if (!out[head] && (pick >> (head & 7) & 1)) {
                out[head] = true;
                offered[head]++;
                offer(&d, head, 1);
            }
        }
        while (was_told(&d))
            ;
        int n = take(&d, pick % 5);
        for (int i = 0; i < n; i++)
            held[num_held++] = d.chain[i].id;
        bool stop = pick % 17 == 0;
        if (stop)
            CHECK_EQ(vhost_queue_stop(d.queue, 1), 0);
        while (num_held && (stop || pick & 3)) {
            uint32_t at = pick % num_held, id = held[at];
            held[at] = held[--num_held];
            if (pick >> 8 & 1) {
                CHECK_EQ(vhost_batch_give_back(d.device, 0, id), 0);
            } else {
                CHECK_EQ(complete(&d, id, 1), 0);
            }
            pick = pick * 5 + 1;
        }
        if (stop) {
            CHECK_EQ(await_event(&d.control, VHOST_EVENT_DONE, 1).result, 0);
            queue_run(&d.control, d.queue);
        }
        while (driver_used_idx(&d.ring) != d.ring.seen) {
            uint32_t id = driver_take(&d.ring).id;
            CHECK(out[id]);
            out[id] = false;
            used[id]++;
        }
    }
    for (uint32_t i = 0; i < num_held; i++)
        CHECK_EQ(complete(&d, held[i], 1), 0);
    uint16_t waits = driver_offered_since(&d.ring, queue_halt(&d.control, d.queue));
    while (driver_used_idx(&d.ring) != d.ring.seen)
        used[driver_take(&d.ring).id]++;
    uint64_t sent = 0, came = 0;
    for (uint32_t i = 0; i < 16; i++) {
        sent += offered[i];
        came += used[i];
    }
    CHECK_EQ(sent, came + waits);
    queue_run(&d.control, d.queue);
    desk_close(&d);
}

static const struct test tests[] = {
    TEST(what_nobody_took_goes_back_into_the_ring), TEST(a_stop_waits_for_what_was_taken),
    TEST(what_is_given_back_is_unpopped),           TEST(what_was_overtaken_is_completed_empty),
    TEST(new_memory_waits_for_chains_in_the_old),   TEST(a_broken_ring_gets_its_chains_back),
    TEST(a_disabled_queue_keeps_nothing),           TEST(nothing_is_lost_by_chance),
};
MAIN(tests)
