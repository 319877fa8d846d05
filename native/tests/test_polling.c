/* Polling and sleep: no wake-up is lost, and a thread without work does not spin. */
#include "rig.h"

static void every_polling_mode_serves(void)
{
    static const struct {
        uint32_t flags, poll_us;
    } mode[] = {{0, 0}, {0, 32}, {0, 1000}, {VHOST_IOTHREAD_POLL_ALWAYS, 0}};

    for (size_t m = 0; m < ARRAY_SIZE(mode); m++) {
        for (uint64_t features = 0; features <= EVENT_IDX; features += EVENT_IDX) {
            struct rig r;
            rig_open_at(&r, 8, features, 0, mode[m].flags, mode[m].poll_us, 0);
            one_byte_each(&r.ring);
            for (int i = 0; i < 200; i++)
                round_trip(&r.ring, i % 8);
            rig_close(&r);
        }
    }
}

/* The race of every driver and device: kick only if asked, sleep only if nothing came. */
static void no_wake_up_is_lost(void)
{
    static const uint32_t poll_us[] = {0, 5, 50};

    for (size_t m = 0; m < ARRAY_SIZE(poll_us); m++) {
        for (uint64_t features = 0; features <= EVENT_IDX; features += EVENT_IDX) {
            struct rig r;
            rig_open_at(&r, 8, features, 0, 0, poll_us[m], 0);
            one_byte_each(&r.ring);
            for (int i = 0; i < 5000; i++) {
                driver_offer(&r.ring, i % 8);
                driver_publish(&r.ring);
                if (driver_wants_kick(&r.ring, 1))
                    driver_kick(&r.ring);
                CHECK_EQ(driver_take(&r.ring).id, i % 8);
            }
            rig_close(&r);
        }
    }
}

static uint64_t cpu_ns_of(const struct vhost_iothread *thread)
{
    char path[64], line[128];

    snprintf(path, sizeof(path), "/proc/self/task/%d/schedstat", vhost_iothread_tid(thread));
    FILE *f = fopen(path, "r");
    CHECK(f != NULL);
    CHECK(fgets(line, sizeof(line), f) != NULL);
    fclose(f);
    return strtoull(line, NULL, 10);
}

/* Wakeups of the iothread between two moments of a test that sends it nothing. */
static uint64_t wakeups(const struct rig *r)
{
    struct vhost_iothread_stats stats;

    vhost_iothread_read_stats(r->control.thread, &stats);
    return stats.wakeups;
}

/* Sends nothing for some time and says whether the iothread used the CPU meanwhile. */
static bool is_idle(struct rig *r)
{
    struct pollfd nothing = {.fd = r->ring.err, .events = POLLIN};
    uint64_t cpu = cpu_ns_of(r->control.thread), woke = wakeups(r), wait_ms = 30;

    CHECK_EQ(poll(&nothing, 1, (int)wait_ms), 0);
    return cpu_ns_of(r->control.thread) - cpu < wait_ms * 1000000 / 3 && wakeups(r) <= woke + 2;
}

static void an_idle_iothread_sleeps(void)
{
    struct rig r;

    rig_open_at(&r, 8, EVENT_IDX, 0, 0, 100, 0);
    one_byte_each(&r.ring);
    round_trip(&r.ring, 0);
    CHECK(is_idle(&r));
    rig_close(&r);
}

static void a_disabled_queue_with_work_sleeps(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    CHECK_EQ(vhost_queue_set_enabled(r.queue, false, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    driver_send(&r.ring, 0);
    CHECK(is_idle(&r));
    rig_close(&r);
}

static void a_draining_queue_with_more_work_sleeps(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    r.probe->hold = true;
    driver_send(&r.ring, 0);
    while (probe_count(r.probe) < 1)
        queue_sync(&r.control, r.queue);
    CHECK_EQ(vhost_queue_stop(r.queue, 77), 0);
    queue_sync(&r.control, r.queue);
    driver_send(&r.ring, 1);
    CHECK(is_idle(&r));
    CHECK_EQ(eventfd_write(r.probe->release, 1), 0);
    CHECK_EQ(await_event(&r.control, VHOST_EVENT_DONE, 77).value, driver_next_index(&r.ring, 1));
    r.probe->hold = false;
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

static void a_broken_queue_sleeps(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    driver_send_empty(&r.ring, 7);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_LENGTH);
    CHECK(is_idle(&r));
    rig_close(&r);
}

static const struct test tests[] = {
    TEST(every_polling_mode_serves),
    TEST(no_wake_up_is_lost),
    TEST(an_idle_iothread_sleeps),
    TEST(a_disabled_queue_with_work_sleeps),
    TEST(a_draining_queue_with_more_work_sleeps),
    TEST(a_broken_queue_sleeps),
};
MAIN(tests)
