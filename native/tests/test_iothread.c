/* The iothread and the life of its queues: start, stop, drain, messages. */
#include "rig.h"
#include <liburing.h>
#include <sched.h>
#include <semaphore.h>

#ifndef PACKED_RINGS /* theirs are in test_ring_packed.c */
static int refused(const struct vhost_queue_config *config, struct rig *r)
{
    struct vhost_queue *q = NULL;
    int err = vhost_queue_new(config, &r->probe->device, r->guest.memory, &q);

    CHECK(q == NULL);
    return err;
}

static void a_wrong_queue_config_is_refused(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    const struct vhost_queue_config good = driver_config(&r.ring, 0);
    struct vhost_queue_config c = good;
    uint64_t end = GUEST_BASE + GUEST_SIZE;

    for (uint32_t size = 0; size <= 65536 * 2; size += 1 + size * 3) {
        c.size = size;
        if (size == 0 || (size & (size - 1)) || size > VIRTQUEUE_MAX_SIZE)
            CHECK_EQ(refused(&c, &r), -EINVAL);
    }
    c.size = 65536;
    CHECK_EQ(refused(&c, &r), -EINVAL);
    c = good;
    c.index = 1;
    CHECK_EQ(refused(&c, &r), -ERANGE);
    c = good;
    c.desc += 8;
    CHECK_EQ(refused(&c, &r), -EINVAL);
    c = good;
    c.avail += 1;
    CHECK_EQ(refused(&c, &r), -EINVAL);
    c = good;
    c.used += 2;
    CHECK_EQ(refused(&c, &r), -EINVAL);
    c = good;
    c.desc = end - 16 * 8 + 16;
    CHECK_EQ(refused(&c, &r), -EFAULT);
    c = good;
    c.avail = end - 2 * 8; /* the entries would end outside */
    CHECK_EQ(refused(&c, &r), -EFAULT);
    c = good;
    c.used = end - 8 * 8;
    CHECK_EQ(refused(&c, &r), -EFAULT);
    c = good;
    c.used = UINT64_MAX - 3;
    CHECK_EQ(refused(&c, &r), -EFAULT);
    c = good;
    c.kick_fd = 12345;
    CHECK(refused(&c, &r) < 0);
    rig_close(&r);
}
#endif

static void a_queue_may_start_again_where_it_stopped(void)
{
    struct rig r;

    rig_open(&r, 8, EVENT_IDX);
    one_byte_each(&r.ring);
    for (uint16_t n = 0; n < 20; n++) {
        round_trip(&r.ring, n % 8);
        CHECK_EQ(queue_halt(&r.control, r.queue), driver_next_index(&r.ring, n + 1));
        queue_run(&r.control, r.queue);
    }
    rig_close(&r);
}

static void work_that_waited_is_served_at_the_start(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    queue_halt(&r.control, r.queue);
    driver_offer(&r.ring, 1);
    driver_publish(&r.ring); /* the kick may have come before us, too */
    queue_run(&r.control, r.queue);
    CHECK_EQ(driver_take(&r.ring).id, 1);
    rig_close(&r);
}

static void a_stop_waits_for_what_is_in_flight(void)
{
    struct rig r;
    struct vhost_event e;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    r.probe->hold = true;
    driver_send(&r.ring, 0);
    driver_send(&r.ring, 1);
    while (probe_count(r.probe) < 2)
        queue_sync(&r.control, r.queue);
    CHECK_EQ(vhost_queue_stop(r.queue, 77), 0);
    queue_sync(&r.control, r.queue);
    driver_send(&r.ring, 2); /* made available during the drain: stays in the ring */
    queue_sync(&r.control, r.queue);
    CHECK_EQ(r.control.num_waiting, 0);
    CHECK_EQ(vhost_queue_free(r.queue), -EBUSY);
    CHECK_EQ(vhost_iothread_free(r.control.thread), -EBUSY);
    CHECK_EQ(eventfd_write(r.probe->release, 1), 0);
    e = await_event(&r.control, VHOST_EVENT_DONE, 77);
    CHECK_EQ(e.result, 0);
    CHECK_EQ(e.value, driver_next_index(&r.ring, 2));
    CHECK_EQ(driver_used_idx(&r.ring), 2);
    CHECK_EQ(probe_count(r.probe), 2);
    r.probe->hold = false;
    queue_run(&r.control, r.queue);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    CHECK_EQ(driver_take(&r.ring).id, 1);
    CHECK_EQ(driver_take(&r.ring).id, 2);
    rig_close(&r);
}

static void a_second_stop_during_a_drain_is_refused(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    r.probe->hold = true;
    driver_send(&r.ring, 0);
    while (probe_count(r.probe) < 1)
        queue_sync(&r.control, r.queue);
    CHECK_EQ(vhost_queue_stop(r.queue, 77), 0);
    CHECK_EQ(vhost_queue_stop(r.queue, 78), 0);
    CHECK_EQ(await_event(&r.control, VHOST_EVENT_DONE, 78).result, -EBUSY);
    CHECK_EQ(eventfd_write(r.probe->release, 1), 0);
    CHECK_EQ(await_event(&r.control, VHOST_EVENT_DONE, 77).value, driver_next_index(&r.ring, 1));
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

static void a_message_behind_a_stop_is_answered(void)
{
    struct rig r;
    int call = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);

    rig_open(&r, 8, 0);
    for (uint64_t i = 0; i < 200; i++) {
        uint64_t token = 10 * i;
        int err[4];
        CHECK_EQ(vhost_queue_stop(r.queue, token), 0);
        /* The stop may be carried out before, between or after these: no matter which. */
        err[0] = vhost_queue_set_call(r.queue, call, token + 1);
        err[1] = vhost_queue_set_enabled(r.queue, true, token + 2);
        err[2] = vhost_queue_set_memory(r.queue, r.guest.memory, token + 3);
        err[3] = vhost_queue_stop(r.queue, token + 4);
        CHECK_EQ(await_event(&r.control, VHOST_EVENT_DONE, token).result, 0);
        for (uint64_t m = 0; m < 4; m++) {
            if (err[m] == 0)
                await_event(&r.control, VHOST_EVENT_DONE, token + 1 + m);
            else
                CHECK_EQ(err[m], -EINVAL);
        }
        queue_run(&r.control, r.queue);
    }
    close(call);
    rig_close(&r);
}

static void messages_need_a_running_queue(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    CHECK_EQ(vhost_queue_start(r.queue, r.control.thread, 5), -EBUSY);
    CHECK_EQ(vhost_queue_free(r.queue), -EBUSY);
    queue_halt(&r.control, r.queue);
    CHECK_EQ(vhost_queue_stop(r.queue, 5), -EINVAL);
    CHECK_EQ(vhost_queue_set_call(r.queue, -1, 5), -EINVAL);
    CHECK_EQ(vhost_queue_set_enabled(r.queue, true, 5), -EINVAL);
    CHECK_EQ(vhost_queue_set_memory(r.queue, r.guest.memory, 5), -EINVAL);
    queue_run(&r.control, r.queue);
    CHECK_EQ(r.control.num_waiting, 0);
    rig_close(&r);
}

static void answers_carry_their_tokens_in_order(void)
{
    struct rig r;
    struct vhost_event e[64];
    uint64_t next = 100;

    rig_open(&r, 8, 0);
    struct vhost_events *none;
    CHECK_EQ(vhost_events_new(&none), 0);
    CHECK_EQ(vhost_events_read(none, e, 7), 0);
    vhost_events_free(none);
    for (uint64_t t = 100; t < 150; t++)
        CHECK_EQ(vhost_queue_set_enabled(r.queue, t % 2, t), 0);
    while (next < 150) {
        await_signal(vhost_events_fd(r.control.events));
        int n = vhost_events_read(r.control.events, e, 7);
        for (int i = 0; i < n; i++) {
            CHECK_EQ(e[i].kind, VHOST_EVENT_DONE);
            CHECK_EQ(e[i].result, 0);
            CHECK_EQ(e[i].token, next++);
        }
    }
    CHECK_EQ(vhost_events_read(r.control.events, e, 7), 0);
    rig_close(&r);
}

/* ---- enabled ---- */

static void a_disabled_queue_waits(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    CHECK_EQ(vhost_queue_set_enabled(r.queue, false, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    driver_send(&r.ring, 0);
    CHECK_EQ(vhost_queue_set_enabled(r.queue, false, ++r.control.token), 0);
    CHECK_EQ(await_done(&r.control).result, 0);
    CHECK_EQ(driver_used_idx(&r.ring), 0);
    CHECK_EQ(vhost_queue_set_enabled(r.queue, true, ++r.control.token), 0);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    await_done(&r.control);
    rig_close(&r);
}

/* ---- memory replaced ---- */

static void set_memory(struct rig *r, struct vhost_memory *memory)
{
    CHECK_EQ(vhost_queue_set_memory(r->queue, memory, ++r->control.token), 0);
    CHECK_EQ(await_done(&r->control).result, 0);
}

static void memory_may_be_replaced_while_running(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    for (int i = 0; i < 20; i++) {
        struct vhost_memory *m = guest_map(r.guest.fd, GUEST_SIZE, i % 2 ? GUEST_SIZE / 2 : 0);
        round_trip(&r.ring, 0);
        set_memory(&r, m);
        vhost_memory_unref(m);
        round_trip(&r.ring, 1);
    }
    rig_close(&r);
}

static void new_memory_waits_for_what_is_in_flight(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    r.probe->hold = true;
    driver_send(&r.ring, 0);
    while (probe_count(r.probe) < 1)
        queue_sync(&r.control, r.queue);
    struct vhost_memory *m = guest_map(r.guest.fd, GUEST_SIZE, 0);
    CHECK_EQ(vhost_queue_set_memory(r.queue, m, 99), 0);
    vhost_memory_unref(m);
    queue_sync(&r.control, r.queue);
    CHECK_EQ(r.control.num_waiting, 0);
    r.probe->hold = false;
    CHECK_EQ(eventfd_write(r.probe->release, 1), 0);
    CHECK_EQ(await_event(&r.control, VHOST_EVENT_DONE, 99).result, 0);
    CHECK_EQ(driver_take(&r.ring).id, 0);
    round_trip(&r.ring, 1);
    rig_close(&r);
}

static void a_ring_that_is_no_longer_mapped_breaks(void)
{
    struct rig r;
    struct vhost_memory *none;

    rig_open(&r, 8, 0);
    CHECK_EQ(vhost_memory_new(NULL, 0, &none), 0);
    set_memory(&r, none);
    vhost_memory_unref(none);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_RING_UNMAPPED);
    rig_close(&r);
}

/* ---- many ---- */

static void many_queues_share_a_thread(void)
{
    enum { N = 3, ROUNDS = 300 };
    struct guest g = guest_new(GUEST_SIZE, 0);
    struct control c = control_new(0, 20);
    struct probe *probe = probe_new(N);
    struct driver_ring d[N];
    struct vhost_queue *q[N];

    for (uint32_t i = 0; i < N; i++) {
        d[i] = driver_new(&g, i, 16, VERSION_1 | (i % 2 ? EVENT_IDX : 0), 0);
        one_byte_each(&d[i]);
        struct vhost_queue_config config = driver_config(&d[i], i);
        CHECK_EQ(vhost_queue_new(&config, &probe->device, g.memory, &q[i]), 0);
        queue_run(&c, q[i]);
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (uint32_t i = 0; i < N; i++) {
            for (uint16_t head = 0; head < 16; head++)
                driver_offer(&d[i], head);
            driver_publish(&d[i]);
            driver_kick(&d[i]);
        }
        for (uint32_t i = 0; i < N; i++) {
            for (uint16_t head = 0; head < 16; head++)
                CHECK_EQ(driver_take(&d[i]).id, head);
        }
    }
    for (uint32_t i = 0; i < N; i++) {
        struct vhost_stats stats;
        CHECK_EQ(queue_halt(&c, q[i]), driver_next_index(&d[i], ROUNDS * 16));
        CHECK_EQ(vhost_queue_free(q[i]), 0);
        CHECK_EQ(vhost_device_read_stats(&probe->device, i, &stats), 0);
        CHECK(stats.counter[VHOST_COUNTER_KICKS] <= ROUNDS);
        driver_free(&d[i]);
    }
    CHECK_EQ(vhost_device_read_stats(&probe->device, N, &(struct vhost_stats){{0}, {0}}), -ERANGE);
    control_free(&c);
    vhost_device_free(&probe->device);
    guest_free(&g);
}

static void queues_come_and_go_beside_a_busy_one(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    struct driver_ring d = driver_new(&r.guest, 1, 8, VERSION_1, 0);
    struct probe *probe = probe_new(1);
    one_byte_each(&d);
    for (int i = 0; i < 100; i++) {
        struct vhost_queue *q;
        struct vhost_queue_config config = driver_config(&d, 0);
        driver_send(&r.ring, 0);
        CHECK_EQ(vhost_queue_new(&config, &probe->device, r.guest.memory, &q), 0);
        queue_run(&r.control, q);
        round_trip(&d, 0);
        CHECK_EQ(queue_halt(&r.control, q), driver_next_index(&d, d.avail_idx));
        CHECK_EQ(vhost_queue_free(q), 0);
        CHECK_EQ(driver_take(&r.ring).id, 0);
    }
    vhost_device_free(&probe->device);
    driver_free(&d);
    rig_close(&r);
}

static void a_thread_can_be_pinned(void)
{
    struct vhost_iothread_config config = {.cpu = 0};
    struct vhost_iothread *thread = NULL;
    struct vhost_events *events;
    cpu_set_t set;

    CHECK_EQ(vhost_events_new(&events), 0);
    CHECK_EQ(vhost_iothread_new(&config, events, &thread), 0);
    CHECK_EQ(sched_getaffinity(vhost_iothread_tid(thread), sizeof(set), &set), 0);
    CHECK_EQ(CPU_COUNT(&set), 1);
    CHECK(CPU_ISSET(0, &set));
    CHECK_EQ(vhost_iothread_free(thread), 0);
    config.cpu = 1023;
    thread = NULL;
    CHECK_EQ(vhost_iothread_new(&config, events, &thread), -EINVAL);
    CHECK(thread == NULL);
    config = (struct vhost_iothread_config){.flags = VHOST_IOTHREAD_NO_IO_URING, .cpu = -1};
    CHECK_EQ(vhost_iothread_new(&config, events, &thread), 0);
    CHECK(!vhost_iothread_has_io_uring(thread));
    CHECK_EQ(vhost_iothread_free(thread), 0);
    vhost_events_free(events);
}

/* ---- the ring's restrictions ---- */

struct request {
    struct io_op ask, answer;
    struct vhost_iothread *thread;
    uint8_t opcode;
    sem_t answered;
};

static void request_answered(struct io_op *op, int32_t result)
{
    struct request *r = container_of(op, struct request, answer);

    op->result = result;
    sem_post(&r->answered);
}

static void request_submit(struct io_op *op, int32_t result)
{
    struct request *r = container_of(op, struct request, ask);
    struct io_uring_sqe *sqe = io_uring_get_sqe(iothread_uring(r->thread));

    (void)result;
    io_uring_prep_rw(r->opcode, sqe, -1, NULL, 0, 0);
    io_uring_sqe_set_data(sqe, &r->answer);
}

/* What the ring answers to a request of this kind for descriptor -1. */
static int32_t ring_answer(struct vhost_iothread *thread, uint8_t opcode)
{
    struct request r = {.ask = {.done = request_submit},
                        .answer = {.done = request_answered},
                        .thread = thread,
                        .opcode = opcode};

    sem_init(&r.answered, 0, 0);
    iothread_complete(thread, &r.ask, 0);
    while (sem_wait(&r.answered) < 0)
        ;
    sem_destroy(&r.answered);
    return r.answer.result;
}

static void its_ring_takes_no_other_requests(void)
{
    static const uint8_t refused[] = {
        IORING_OP_NOP,     IORING_OP_OPENAT,  IORING_OP_OPENAT2, IORING_OP_UNLINKAT,
        IORING_OP_CONNECT, IORING_OP_ACCEPT,  IORING_OP_SEND,    IORING_OP_RECV,
        IORING_OP_SENDMSG, IORING_OP_RECVMSG, IORING_OP_READ,    IORING_OP_WRITE,
        IORING_OP_SPLICE,  IORING_OP_CLOSE,   IORING_OP_STATX,   IORING_OP_SOCKET,
    };
    struct control c = control_new(0, 0);

    if (!vhost_iothread_has_io_uring(c.thread)) {
        printf("# this host refuses io_uring\n");
        control_free(&c);
        return;
    }
    for (size_t i = 0; i < sizeof(refused); i++)
        CHECK_EQ(ring_answer(c.thread, refused[i]), -EACCES);
    CHECK_EQ(ring_answer(c.thread, IORING_OP_READV), -EBADF);
    CHECK_EQ(ring_answer(c.thread, IORING_OP_WRITEV), -EBADF);
    CHECK_EQ(ring_answer(c.thread, IORING_OP_FSYNC), -EBADF);
    CHECK_EQ(ring_answer(c.thread, IORING_OP_ASYNC_CANCEL), -ENOENT);
    control_free(&c);
}

static const struct test tests[] = {
#ifndef PACKED_RINGS
    TEST(a_wrong_queue_config_is_refused),
#endif
    TEST(a_queue_may_start_again_where_it_stopped), TEST(work_that_waited_is_served_at_the_start),
    TEST(a_stop_waits_for_what_is_in_flight),       TEST(a_second_stop_during_a_drain_is_refused),
    TEST(a_message_behind_a_stop_is_answered),      TEST(messages_need_a_running_queue),
    TEST(answers_carry_their_tokens_in_order),      TEST(a_disabled_queue_waits),
    TEST(memory_may_be_replaced_while_running),     TEST(new_memory_waits_for_what_is_in_flight),
    TEST(a_ring_that_is_no_longer_mapped_breaks),   TEST(many_queues_share_a_thread),
    TEST(queues_come_and_go_beside_a_busy_one),     TEST(a_thread_can_be_pinned),
    TEST(its_ring_takes_no_other_requests),
};
MAIN(tests)
