/*
 * Guest memory that changes while it is in use: files that shrink, guests that write where only
 * the device should, and what it is just reading.
 */
#include "street.h"

static void a_truncated_memory_file_breaks_its_queues_only(void)
{
    struct street s;
    struct guest other = guest_new(GUEST_SIZE, 0);

    street_open(&s, 8, 0);
    /* The broken rig works in a guest of its own; the neighbour keeps the first. */
    struct driver_ring d = driver_new(&other, 0, 8, VERSION_1, 0);
    struct probe *probe = probe_new(1);
    struct vhost_queue *q;
    struct vhost_queue_config config = driver_config(&d, 0);
    config.token = 3000;
    CHECK_EQ(vhost_queue_new(&config, &probe->device, other.memory, &q), 0);
    queue_run(&s.rig.control, q);
    set_desc(d.desc, 0, buffer_addr(&d, 0), 8, VRING_DESC_F_WRITE, 0);
    driver_offer(&d, 0);
    driver_publish(&d);
    /* The rings stay, the buffer goes. */
    CHECK_EQ(ftruncate(other.fd, AT_BUFFER), 0);
    driver_kick(&d);
    struct vhost_event e = await_event(&s.rig.control, VHOST_EVENT_BROKEN, 3000);
    CHECK_EQ(e.value, VHOST_FAULT_MEMORY);
    CHECK_EQ(take_signals(d.err), 1);
    queue_halt(&s.rig.control, q);
    CHECK_EQ(vhost_queue_free(q), 0);
    vhost_device_free(&probe->device);
    driver_free(&d);
    guest_free(&other);
    street_close(&s);
}

static void a_memory_file_truncated_to_nothing(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    CHECK_EQ(ftruncate(r.guest.fd, 0), 0);
    driver_kick(&r.ring);
    CHECK_EQ(rig_await_fault(&r), VHOST_FAULT_MEMORY);
    rig_close(&r);
}

/* ---- guests that write where only the device should, or what it is just reading ---- */

static void used_index_and_flags_are_never_read_back(void)
{
    struct rig r;

    rig_open(&r, 8, 0);
    one_byte_each(&r.ring);
    driver_send(&r.ring, 0);
    driver_take(&r.ring);
    r.ring.used[0] = 0xffff;
    r.ring.used[1] = 0x1234;
    queue_sync(&r.control, r.queue);
    r.ring.seen = 1;
    driver_offer(&r.ring, 0);
    driver_publish(&r.ring);
    driver_kick(&r.ring);
    while (driver_used_idx(&r.ring) != 2)
        queue_sync(&r.control, r.queue);
    CHECK_EQ(queue_halt(&r.control, r.queue), 2);
    queue_run(&r.control, r.queue);
    rig_close(&r);
}

/* The device then writes its pattern over the ring: whatever it finds there must not kill it. */
static void a_buffer_that_is_the_ring_itself(void)
{
    struct street s;
    uint64_t share = AT_BUFFER;

    street_open(&s, 8, 0);
    set_desc(s.rig.ring.desc, 0, s.rig.ring.base, (uint32_t)share, VRING_DESC_F_WRITE, 0);
    driver_send(&s.rig.ring, 0);
    driver_kick(&s.rig.ring);
    /* avail.idx is now 0x5a5a, far ahead. */
    CHECK_EQ(rig_await_fault(&s.rig), VHOST_FAULT_AVAIL_INDEX);
    street_close(&s);
}

struct scribbler {
    struct driver_ring *d;
    atomic_bool stop;
};

static void *scribble(void *arg)
{
    struct scribbler *s = arg;
    struct driver_ring *d = s->d;

    /* Legal or hostile from one moment to the next; never both to one reader. */
    for (unsigned i = 0; !atomic_load(&s->stop); i++) {
        volatile struct vring_desc *desc = &d->desc[i % 2];
        desc->len = i % 3 ? 64 : UINT32_MAX;
        desc->addr = i % 5 ? buffer_addr(d, 0) : UINT64_MAX - 8;
        desc->next = i % 7 ? 1 : 0x7fff;
        desc->flags = (uint16_t)(i % 11 ? VRING_DESC_F_WRITE : VRING_DESC_F_NEXT);
    }
    return NULL;
}

/* Time of check, time of use: run under the sanitizers this would show a second read. */
static void descriptors_rewritten_while_they_are_read(void)
{
    for (int round = 0; round < 50; round++) {
        struct rig r;
        pthread_t thread;

        rig_open(&r, 8, 0);
        struct scribbler s = {.d = &r.ring};
        one_byte_each(&r.ring);
        CHECK_EQ(pthread_create(&thread, NULL, scribble, &s), 0);
        for (int i = 0; i < 200; i++) {
            driver_offer(&r.ring, 0);
            driver_publish(&r.ring);
            driver_kick(&r.ring);
            struct pollfd p = {.fd = r.ring.err, .events = POLLIN};
            while (driver_used_idx(&r.ring) != r.ring.avail_idx && poll(&p, 1, 0) == 0)
                continue;
            if (p.revents)
                break;
        }
        atomic_store(&s.stop, true);
        pthread_join(thread, NULL);
        rig_close(&r);
    }
}

static const struct test tests[] = {
    TEST(a_truncated_memory_file_breaks_its_queues_only), TEST(a_memory_file_truncated_to_nothing),
    TEST(used_index_and_flags_are_never_read_back),       TEST(a_buffer_that_is_the_ring_itself),
    TEST(descriptors_rewritten_while_they_are_read),
};
MAIN(tests)
