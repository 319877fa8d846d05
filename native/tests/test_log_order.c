/* When the bits of what was noted are set, on a queue that no thread has. */
#include "logged.h"

/* One page for each byte of the log of the guest's memory. */
enum { FAR = 8 * PAGE, SPREAD = (int)GUEST_SIZE / (int)FAR };

_Static_assert((int)SPREAD > (int)LOG_MARKS, "more than are noted at once");

struct halted {
    struct rig rig;
    struct vhost_log *log;
};

static void halted_open(struct halted *h, uint32_t iothread_flags)
{
    rig_open_at(&h->rig, 8, 0, 0, iothread_flags, 0, 0);
    h->log = log_of_guest();
    set_log(&h->rig.control, h->rig.queue, h->log, h->rig.ring.base + AT_USED);
    queue_halt(&h->rig.control, h->rig.queue);
    take_pages(h->log);
}

static void halted_close(struct halted *h)
{
    queue_run(&h->rig.control, h->rig.queue);
    rig_close(&h->rig);
    vhost_log_unref(h->log);
}

static void wrote(struct halted *h, uint64_t addr)
{
    struct iovec iov = {.iov_base = vhost_memory_translate(h->rig.guest.memory, addr, 16),
                        .iov_len = 16};

    log_written(h->rig.queue, &iov, 1, iov.iov_len);
}

/* A chain is popped, its buffer written, and used; not shown yet. */
static uint64_t use_one(struct halted *h)
{
    struct driver_ring *d = &h->rig.ring;
    uint64_t addr = buffer_addr(d, 16 * PAGE);
    struct chain c;

    set_desc(d->desc, 0, addr, 16, VRING_DESC_F_WRITE, 0);
    driver_offer(d, 0);
    driver_publish(d);
    CHECK(ring_pop(h->rig.queue, &c));
    wrote(h, addr);
    h->rig.queue->dirty = true; /* it has no thread to tell */
    ring_push(h->rig.queue, c.head, 16);
    return addr;
}

static void data_before_the_driver_is_shown_it(void)
{
    struct halted h;

    halted_open(&h, 0);
    uint64_t addr = use_one(&h);
    struct pages p = take_pages(h.log);
    expect_no_more(&p);
    ring_show(h.rig.queue);
    p = take_pages(h.log);
    expect_pages(&p, addr, 16);
    h.rig.queue->dirty = false;
    halted_close(&h);
}

static void publish_and_expect_the_ring(bool calls)
{
    struct halted h;

    halted_open(&h, 0);
    struct vhost_queue *q = h.rig.queue;
    int call = q->call_fd;
    uint64_t addr = use_one(&h);
    q->call_fd = calls ? call : -1;
    ring_publish(q);
    q->call_fd = call;
    q->dirty = false;
    struct pages p = take_pages(h.log);
    expect_pages(&p, addr, 16);
    forget_pages(&p, addr, 16);
    expect_ring(&p, &h.rig.ring);
    expect_no_more(&p);
    halted_close(&h);
}

static void the_ring_when_it_is_published(void)
{
    publish_and_expect_the_ring(true);
}

static void the_ring_of_a_driver_that_is_never_called(void)
{
    publish_and_expect_the_ring(false);
}

static void more_than_are_noted_at_once(void)
{
    struct halted h;

    halted_open(&h, 0);
    for (int i = 0; i < SPREAD; i++)
        wrote(&h, GUEST_BASE + (uint64_t)i * FAR);
    log_flush(h.rig.queue);
    struct pages p = take_pages(h.log);
    for (int i = 0; i < SPREAD; i++) {
        expect_pages(&p, GUEST_BASE + (uint64_t)i * FAR, 16);
        forget_pages(&p, GUEST_BASE + (uint64_t)i * FAR, 16);
    }
    expect_no_more(&p);
    halted_close(&h);
}

/* Bits are added to what was noted of their byte shortly before. */
static void pages_of_two_bytes_in_turn(void)
{
    struct halted h;
    const uint64_t from[] = {GUEST_BASE + FAR, GUEST_BASE + 3 * FAR};

    halted_open(&h, 0);
    for (uint64_t i = 0; i < 4; i++) {
        for (int half = 0; half < 2; half++)
            wrote(&h, from[half] + 2 * i * PAGE);
    }
    log_flush(h.rig.queue);
    struct pages p = take_pages(h.log);
    for (uint64_t i = 0; i < 4; i++) {
        for (int half = 0; half < 2; half++) {
            expect_pages(&p, from[half] + 2 * i * PAGE, 16);
            forget_pages(&p, from[half] + 2 * i * PAGE, 16);
        }
    }
    expect_no_more(&p);
    halted_close(&h);
}

static void all_when_control_is_answered(void)
{
    struct halted h;

    /* A thread that rests sets bits when it arms the ring. */
    halted_open(&h, VHOST_IOTHREAD_POLL_ALWAYS);
    wrote(&h, GUEST_BASE + FAR);
    queue_run(&h.rig.control, h.rig.queue);
    struct pages p = take_pages(h.log);
    expect_pages(&p, GUEST_BASE + FAR, 16);
    queue_halt(&h.rig.control, h.rig.queue);
    halted_close(&h);
}

/* A look is enough where the bit is set, and not where it was taken. */
static void again_after_it_was_taken(void)
{
    struct halted h;

    halted_open(&h, 0);
    for (int i = 0; i < 3; i++) {
        for (int again = 0; again < 2; again++) {
            wrote(&h, GUEST_BASE + FAR);
            log_flush(h.rig.queue);
        }
        struct pages p = take_pages(h.log);
        expect_pages(&p, GUEST_BASE + FAR, 16);
        forget_pages(&p, GUEST_BASE + FAR, 16);
        expect_no_more(&p);
    }
    halted_close(&h);
}

static const struct test tests[] = {
    TEST(data_before_the_driver_is_shown_it),
    TEST(the_ring_when_it_is_published),
    TEST(the_ring_of_a_driver_that_is_never_called),
    TEST(more_than_are_noted_at_once),
    TEST(pages_of_two_bytes_in_turn),
    TEST(all_when_control_is_answered),
    TEST(again_after_it_was_taken),
};
MAIN(tests)
