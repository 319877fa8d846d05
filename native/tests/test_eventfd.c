/* Kick and call eventfds: replaced while the queue runs, absent, and full. */
#include "rig.h"

static void a_new_call_fd_is_called_at_once_and_from_then_on(void)
{
    struct rig r;
    int call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    round_trip(&r.ring, 0);
    CHECK_EQ(vhost_queue_set_call(r.queue, call, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    take_signals(r.ring.call);
    CHECK(take_signals(call) >= 1); /* what the old one was told may never have been read */
    round_trip(&r.ring, 1);
    queue_sync(&r.control, r.queue);
    CHECK_EQ(take_signals(call), 1);
    CHECK_EQ(take_signals(r.ring.call), 0);
    CHECK_EQ(vhost_queue_set_call(r.queue, -1, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    round_trip(&r.ring, 2);
    queue_sync(&r.control, r.queue);
    CHECK_EQ(take_signals(call), 0);
    close(call);
    rig_close(&r);
}

static void a_new_kick_fd_takes_over(void)
{
    struct rig r;
    int old, kick = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    round_trip(&r.ring, 0);
    old = r.ring.kick;
    CHECK_EQ(vhost_queue_set_kick(r.queue, kick, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    r.ring.kick = kick;
    for (int i = 0; i < 10; i++)
        round_trip(&r.ring, 1);
    close(old);
    rig_close(&r);
}

static void without_a_kick_fd_the_ring_is_polled(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    CHECK_EQ(vhost_queue_set_kick(r.queue, -1, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    for (int i = 0; i < 10; i++) {
        driver_offer(&r.ring, 1);
        driver_publish(&r.ring);
        CHECK_EQ(driver_take(&r.ring).id, 1);
    }
    rig_close(&r);
}

static void a_call_fd_that_is_full_never_hangs(void)
{
    for (int nonblock = 0; nonblock < 2; nonblock++) {
        struct rig r;
        int full = eventfd(0, EFD_CLOEXEC | (nonblock ? EFD_NONBLOCK : 0));

        rig_open(&r, 8, 0);
        one_byte_each(&r.ring);
        CHECK_EQ(vhost_queue_set_call(r.queue, full, ++r.control.token), 0);
        CHECK_EQ(await_done(&r.control).result, 0);
        CHECK_EQ(take_signals(full), 1);
        CHECK_EQ(eventfd_write(full, UINT64_MAX - 1), 0);
        for (int i = 0; i < 10; i++)
            round_trip(&r.ring, 0);
        close(full);
        rig_close(&r);
    }
}

static void a_kick_fd_at_its_maximum_still_works(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    CHECK_EQ(eventfd_write(r.ring.kick, UINT64_MAX - 1), 0);
    driver_offer(&r.ring, 0);
    driver_publish(&r.ring);
    CHECK_EQ(vhost_queue_set_kick(r.queue, r.ring.kick, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    rig_close(&r);
}

static const struct test tests[] = {
    TEST(a_new_call_fd_is_called_at_once_and_from_then_on),
    TEST(a_new_kick_fd_takes_over),
    TEST(without_a_kick_fd_the_ring_is_polled),
    TEST(a_call_fd_that_is_full_never_hangs),
    TEST(a_kick_fd_at_its_maximum_still_works),
};
MAIN(tests)
