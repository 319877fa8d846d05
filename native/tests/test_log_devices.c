/* The dirty log of batch devices and cards, and what those who read it under load may trust. */
#include "desk.h"
#include "disk.h"
#include "logged.h"
#include <sys/socket.h>

/* ---- batches ---- */

static void chains_in_flight_are_logged_as_far_as_they_were_written(void)
{
    struct desk d;
    struct vhost_log *log = log_of_guest();

    desk_open(&d, 8, 0, AT_BUFFER + 4 * PAGE); /* the seam of two regions lies in the first */
    set_desc(d.ring.desc, 0, buffer_addr(&d.ring, 0), PAGE, VRING_DESC_F_NEXT, 1);
    set_desc(d.ring.desc, 1, buffer_addr(&d.ring, PAGE), 5 * PAGE,
             VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, 2);
    set_desc(d.ring.desc, 2, buffer_addr(&d.ring, 8 * PAGE), 4 * PAGE, VRING_DESC_F_WRITE, 0);
    set_desc(d.ring.desc, 3, buffer_addr(&d.ring, 16 * PAGE), PAGE, VRING_DESC_F_WRITE, 0);
    driver_offer(&d.ring, 0);
    driver_offer(&d.ring, 3);
    driver_publish(&d.ring);
    driver_kick(&d.ring);
    await_told(&d, VHOST_EVENT_CHAINS);
    CHECK_EQ(take(&d, CHAINS), 2);
    set_log(&d.control, d.queue, log, UNLOGGED);
    CHECK_EQ(complete(&d, 0, 5 * PAGE + 1), 0);
    CHECK_EQ(complete(&d, 3, 0), 0);
    CHECK_EQ(driver_take(&d.ring).len, 5 * PAGE + 1);
    CHECK_EQ(driver_take(&d.ring).len, 0);
    struct pages p = take_pages(log);
    expect_pages(&p, buffer_addr(&d.ring, PAGE), 5 * PAGE);
    forget_pages(&p, buffer_addr(&d.ring, PAGE), 5 * PAGE);
    expect_pages(&p, buffer_addr(&d.ring, 8 * PAGE), 1);
    forget_pages(&p, buffer_addr(&d.ring, 8 * PAGE), 1);
    expect_no_more(&p);
    desk_close(&d);
    vhost_log_unref(log);
}

/* ---- net ---- */

struct card {
    struct guest guest;
    struct driver_ring ring;
    struct control control;
    struct vhost_device *device;
    struct vhost_queue *queue;
    struct vhost_log *log;
    int tap[2]; /* ours, the device's */
};

static void card_open(struct card *c, uint64_t features)
{
    *c = (struct card){.log = log_of_guest()};
    CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, c->tap), 0);
    struct vhost_net_config net = {.tap_fds = &c->tap[1], .num_pairs = 1};
    CHECK_EQ(vhost_net_new(&net, &c->device), 0);
    c->guest = guest_new(4 * GUEST_SIZE, 0);
    c->ring = driver_new(&c->guest, 0, 16, VERSION_1 | features, 0);
    c->control = control_new(0, 0);
    struct vhost_queue_config config = driver_config(&c->ring, 0);
    CHECK_EQ(vhost_queue_new(&config, c->device, c->guest.memory, &c->queue), 0);
    queue_run(&c->control, c->queue);
    set_log(&c->control, c->queue, c->log, c->ring.base + AT_USED);
    for (uint16_t i = 0; i < 16; i++)
        set_desc(c->ring.desc, i, buffer_addr(&c->ring, 2u * i * PAGE), PAGE, VRING_DESC_F_WRITE,
                 0);
}

static void card_close(struct card *c)
{
    queue_halt(&c->control, c->queue);
    CHECK_EQ(vhost_queue_free(c->queue), 0);
    control_free(&c->control);
    vhost_device_free(c->device);
    driver_free(&c->ring);
    guest_free(&c->guest);
    close(c->tap[0]);
    close(c->tap[1]);
    vhost_log_unref(c->log);
}

static void card_receive(struct card *c, size_t len)
{
    static char frame[65536];

    CHECK_EQ(send(c->tap[0], frame, len, 0), (ssize_t)len);
}

/* The buffers [first, end), a page each, and the used ring. */
static void expect_buffers(struct card *c, uint16_t first, uint16_t end)
{
    queue_sync(&c->control, c->queue);
    struct pages p = take_pages(c->log);
    for (uint16_t i = first; i < end; i++) {
        expect_pages(&p, buffer_addr(&c->ring, 2u * i * PAGE), PAGE);
        forget_pages(&p, buffer_addr(&c->ring, 2u * i * PAGE), PAGE);
    }
    forget_ring(&p, &c->ring);
    expect_no_more(&p);
}

static void frames_are_logged(void)
{
    struct card c;

    card_open(&c, UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF);
    for (uint16_t i = 0; i < 6; i++)
        driver_send(&c.ring, i);
    card_receive(&c, 100);
    CHECK_EQ(driver_take(&c.ring).len, 100);
    expect_buffers(&c, 0, 1);
    card_receive(&c, 2 * PAGE + 1);
    driver_await_used(&c.ring, 3);
    c.ring.seen += 3;
    expect_buffers(&c, 1, 4);
    card_close(&c);
}

/* It waits half in the guest's buffers and half in ours until there are more. */
static void a_frame_that_waits_for_buffers_is_logged_whole(void)
{
    struct card c;

    card_open(&c, UINT64_C(1) << VIRTIO_NET_F_MRG_RXBUF);
    driver_send(&c.ring, 0);
    queue_sync(&c.control, c.queue);
    card_receive(&c, 3 * PAGE);
    /* Whether it has been read by now or not: the rest of it comes with these. */
    for (uint16_t i = 1; i < 3; i++)
        driver_send(&c.ring, i);
    driver_await_used(&c.ring, 3);
    c.ring.seen += 3;
    expect_buffers(&c, 0, 3);
    card_close(&c);
}

static void a_frame_that_does_not_fit_is_logged_as_well(void)
{
    struct card c;

    card_open(&c, 0);
    driver_send(&c.ring, 0);
    card_receive(&c, PAGE + 1);
    CHECK_EQ(driver_take(&c.ring).len, 0);
    expect_buffers(&c, 0, 1);
    card_close(&c);
}

/* ---- readers ---- */

enum { ROUNDS = 300 };

struct reader {
    struct disk *d;
    atomic_bool done;
};

static void *read_the_disk(void *arg)
{
    struct reader *r = arg;

    for (uint32_t i = 0; i < ROUNDS; i++)
        CHECK_OK(disk_read(r->d, i * 61 % 1900, (i % 128 + 1) * SECTOR), (i % 128 + 1) * SECTOR);
    atomic_store(&r->done, true);
    return NULL;
}

static void copy_dirty(const char *memory, struct vhost_log *log, char *copy)
{
    struct pages p = take_pages(log);

    for (int i = 0; i < PAGES; i++) {
        if (p.dirty[i])
            memcpy(copy + i * PAGE, memory + i * PAGE, PAGE);
    }
}

/* A migration in small: pages are copied while requests run, between two logs, and what the device
 * wrote last must be in the copy. */
static void copy_while_it_runs(struct disk *d)
{
    struct vhost_log *log[2] = {log_of_guest(), log_of_guest()};
    struct reader reader = {.d = d};
    char *copy = malloc(4 * GUEST_SIZE);
    /* A mapping of its own: what is read here is written at the same time, and TSan would tell. */
    char *memory = mmap(NULL, 4 * GUEST_SIZE, PROT_READ, MAP_SHARED, d->guest.fd, 0);
    uint64_t used = d->ring.base + AT_USED;
    pthread_t thread;

    CHECK(copy != NULL && memory != MAP_FAILED);
    for (uint32_t i = 0; i < DISK_SECTORS; i++)
        image_fill(d, i, (unsigned char)(i * 7 + i / 256), SECTOR);
    CHECK_EQ(pthread_create(&thread, NULL, read_the_disk, &reader), 0);
    set_log(&d->control, d->queue, log[0], used);
    memcpy(copy, memory, 4 * GUEST_SIZE);
    for (int i = 1; !atomic_load(&reader.done); i++) {
        copy_dirty(memory, log[i % 2], copy);
        if (i % 4 == 0) {
            set_log(&d->control, d->queue, log[i / 4 % 2], used);
            copy_dirty(memory, log[(i / 4 + 1) % 2], copy);
        }
    }
    CHECK_EQ(pthread_join(thread, NULL), 0);
    queue_halt(&d->control, d->queue);
    copy_dirty(memory, log[0], copy);
    copy_dirty(memory, log[1], copy);
    size_t data = AT_BUFFER + DATA;
    CHECK(memcmp(copy + data, memory + data, 128 * SECTOR) == 0);
    CHECK(memcmp(copy + AT_USED, memory + AT_USED, AT_TABLE - AT_USED) == 0);
    queue_run(&d->control, d->queue);
    free(copy);
    munmap(memory, 4 * GUEST_SIZE);
    vhost_log_unref(log[0]);
    vhost_log_unref(log[1]);
}

static void a_copy_made_while_requests_run_is_whole(void)
{
    on_every_disk(copy_while_it_runs);
}

static const struct test tests[] = {
    TEST(chains_in_flight_are_logged_as_far_as_they_were_written),
    TEST(frames_are_logged),
    TEST(a_frame_that_waits_for_buffers_is_logged_whole),
    TEST(a_frame_that_does_not_fit_is_logged_as_well),
    TEST(a_copy_made_while_requests_run_is_whole),
};
MAIN(tests)
