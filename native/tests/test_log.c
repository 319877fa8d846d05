/* The dirty log of a disk: what is in it after requests of all kinds, and logs that will not do. */
#include "disk.h"
#include "logged.h"

/* ---- the log itself ---- */

static void bits_are_taken_once_and_added(void)
{
    struct vhost_log *log;
    uint8_t bits[2] = {0x80, 0};

    CHECK_EQ(vhost_log_new(17, &log), 0);
    CHECK_EQ(log->size, 3);
    log->bits[1] = 0xa5;
    log->bits[2] = 0xff;
    CHECK_EQ(vhost_log_take(log, 8, bits, 12), 0);
    CHECK_EQ(bits[0], 0xa5 | 0x80);
    CHECK_EQ(bits[1], 0x0f);
    CHECK_EQ(log->bits[1], 0);
    CHECK_EQ(log->bits[2], 0xf0);
    CHECK_EQ(vhost_log_take(log, 8, bits, 12), 0);
    CHECK_EQ(bits[0], 0xa5 | 0x80);
    vhost_log_unref(log);
}

static void what_is_not_in_the_log_cannot_be_taken(void)
{
    struct vhost_log *log;
    uint8_t bits[8] = {0};

    CHECK_EQ(vhost_log_new(0, &log), -EINVAL);
    CHECK_EQ(vhost_log_new(16, &log), 0);
    CHECK_EQ(vhost_log_take(log, 4, bits, 4), -EINVAL);
    CHECK_EQ(vhost_log_take(log, 0, bits, 17), -ERANGE);
    CHECK_EQ(vhost_log_take(log, 24, bits, 0), -ERANGE);
    CHECK_EQ(vhost_log_take(log, 8, bits, UINT64_MAX), -ERANGE);
    CHECK_EQ(vhost_log_take(log, UINT64_MAX - 7, bits, 8), -ERANGE);
    CHECK_EQ(vhost_log_take(log, 16, bits, 0), 0);
    CHECK_EQ(vhost_log_take(log, 0, bits, 16), 0);
    vhost_log_unref(log);
}

static int log_file(uint64_t size)
{
    int fd = memfd_create("log", MFD_CLOEXEC);

    CHECK(fd >= 0);
    CHECK_EQ(ftruncate(fd, (off_t)size), 0);
    return fd;
}

static void a_file_that_is_no_log(void)
{
    int fd = log_file(PAGE);
    struct vhost_log *log;

    CHECK_EQ(vhost_log_map(fd, 0, 0, &log), -EINVAL);
    CHECK_EQ(vhost_log_map(fd, 1, PAGE, &log), -ENXIO);
    CHECK_EQ(vhost_log_map(fd, UINT64_MAX - 7, 16, &log), -EINVAL);
    close(fd);
}

/* ---- the block device ---- */

static struct vhost_log *disk_log(struct disk *d)
{
    struct vhost_log *log = log_of_guest();

    set_log(&d->control, d->queue, log, d->ring.base + AT_USED);
    return log;
}

/* The used ring, and what this request has written; nothing else. */
static void expect_request(struct disk *d, struct vhost_log *log, uint64_t data_len)
{
    queue_sync(&d->control, d->queue);
    queue_sync(&d->control, d->queue);
    struct pages p = take_pages(log);
    if (data_len) {
        expect_pages(&p, buffer_addr(&d->ring, DATA), data_len);
        forget_pages(&p, buffer_addr(&d->ring, DATA), data_len);
    }
    expect_pages(&p, buffer_addr(&d->ring, STATUS), 1);
    forget_pages(&p, buffer_addr(&d->ring, STATUS), 1);
    expect_ring(&p, &d->ring);
    expect_no_more(&p);
}

static void requests_of_a_disk(struct disk *d)
{
    struct vhost_log *log = disk_log(d);

    image_fill(d, 0, 'x', 128 * SECTOR);
    CHECK_OK(disk_read(d, 0, 8 * SECTOR), 8 * SECTOR);
    expect_request(d, log, 8 * SECTOR);
    CHECK_OK(disk_read(d, 0, 128 * SECTOR), 128 * SECTOR);
    expect_request(d, log, 128 * SECTOR);
    CHECK_OK(disk_read(d, 0, SECTOR), SECTOR);
    expect_request(d, log, SECTOR);
    CHECK_OK(disk_write(d, 8, 128 * SECTOR), 0);
    expect_request(d, log, 0);
    CHECK_OK(request(d, VIRTIO_BLK_T_FLUSH, 0, 0, false), 0);
    expect_request(d, log, 0);
    CHECK_OK(request(d, VIRTIO_BLK_T_GET_ID, 0, VIRTIO_BLK_ID_BYTES, true), VIRTIO_BLK_ID_BYTES);
    expect_request(d, log, VIRTIO_BLK_ID_BYTES);
    struct virtio_blk_range range = {.sector = 0, .num_sectors = 8};
    CHECK_OK(disk_ranges(d, VIRTIO_BLK_T_WRITE_ZEROES, &range, 1), 0);
    expect_request(d, log, 0);
    /* The read before it was longer: what was left of that must not be logged. */
    CHECK_OK(disk_read(d, 0, 128 * SECTOR), 128 * SECTOR);
    expect_request(d, log, 128 * SECTOR);
    CHECK_IOERR(disk_read(d, DISK_SECTORS, SECTOR));
    expect_request(d, log, 0);
    CHECK_UNSUPP(request(d, 77, 0, SECTOR, true));
    expect_request(d, log, 0);

    set_log(&d->control, d->queue, NULL, UNLOGGED);
    take_pages(log);
    CHECK_OK(disk_read(d, 0, 8 * SECTOR), 8 * SECTOR);
    queue_sync(&d->control, d->queue);
    struct pages p = take_pages(log);
    expect_no_more(&p);
    vhost_log_unref(log);
}

static void requests_are_logged_on_every_disk(void)
{
    on_every_disk(requests_of_a_disk);
}

/* The image ends within what is read: a part arrives, and then an error. */
static void a_short_read(struct disk *d)
{
    struct vhost_log *log = disk_log(d);

    CHECK_EQ(ftruncate(d->beside, 8 * SECTOR), 0);
    CHECK_IOERR(disk_read(d, 0, 64 * SECTOR));
    queue_sync(&d->control, d->queue);
    struct pages p = take_pages(log);
    expect_pages(&p, buffer_addr(&d->ring, DATA), 8 * SECTOR);
    vhost_log_unref(log);
}

static void a_read_that_fails_in_the_middle_is_logged(void)
{
    on_every_disk(a_short_read);
}

#ifndef PACKED_RINGS
static void the_used_ring_is_logged_where_it_was_told(void)
{
    struct disk d;
    struct vhost_log *log = log_of_guest();
    uint64_t elsewhere = GUEST_BASE + 3 * GUEST_SIZE;

    disk_open(&d, &disk_kinds[0]);
    set_log(&d.control, d.queue, log, elsewhere);
    CHECK_OK(disk_write(&d, 0, SECTOR), 0);
    queue_sync(&d.control, d.queue);
    struct pages p = take_pages(log);
    expect_pages(&p, elsewhere, 1);
    forget_pages(&p, elsewhere, 6 + 8 * d.ring.size);
    expect_pages(&p, buffer_addr(&d.ring, STATUS), 1);
    forget_pages(&p, buffer_addr(&d.ring, STATUS), 1);
    expect_no_more(&p);

    set_log(&d.control, d.queue, log, UNLOGGED);
    take_pages(log);
    CHECK_OK(disk_write(&d, 0, SECTOR), 0);
    queue_sync(&d.control, d.queue);
    p = take_pages(log);
    forget_pages(&p, buffer_addr(&d.ring, STATUS), 1);
    expect_no_more(&p);
    disk_close(&d);
    vhost_log_unref(log);
}
#endif

static void a_queue_can_start_with_a_log(void)
{
    struct disk d;
    struct vhost_log *log = log_of_guest();

    disk_open(&d, &disk_kinds[0]);
    uint32_t next = queue_halt(&d.control, d.queue);
    CHECK_EQ(vhost_queue_free(d.queue), 0);
    struct vhost_queue_config config = driver_config(&d.ring, 0);
    config.next_index = next;
    config.log = log;
    config.log_used = d.ring.base + AT_USED;
    CHECK_EQ(vhost_queue_new(&config, d.device, d.guest.memory, &d.queue), 0);
    queue_run(&d.control, d.queue);
    CHECK_OK(disk_read(&d, 0, SECTOR), SECTOR);
    expect_request(&d, log, SECTOR);
    vhost_log_unref(log); /* the queue has its own */
    CHECK_OK(disk_read(&d, 0, SECTOR), SECTOR);
    disk_close(&d);
}

/* ---- logs that will not do ---- */

/* A log of one page of bits, which end before the guest's memory does. */
static void a_log_that_is_too_short_breaks_the_queue(void)
{
    struct disk d;
    struct vhost_log *log;
    uint64_t size = (GUEST_BASE + AT_BUFFER + DATA) / PAGE / 8 + 1;
    int fd = log_file(PAGE);
    uint8_t bits[PAGE];

    disk_open(&d, &disk_kinds[0]);
    CHECK_EQ(vhost_log_map(fd, 0, size, &log), 0);
    set_log(&d.control, d.queue, log, UNLOGGED);
    CHECK_OK(disk_read(&d, 0, SECTOR), SECTOR);
    d.ring.desc[1].len = 128 * SECTOR;
    driver_send(&d.ring, 0);
    struct vhost_event e = await_event(&d.control, VHOST_EVENT_BROKEN, 1000);
    CHECK_EQ(e.value, VHOST_FAULT_LOG);
    CHECK_EQ(take_signals(d.ring.err), 1);
    CHECK_EQ(pread(fd, bits, sizeof(bits), 0), sizeof(bits));
    CHECK(bits[size - 1] != 0);
    CHECK(all_bytes_are(bits + size, 0, sizeof(bits) - size));
    vhost_log_unref(log);
    close(fd);
    disk_close(&d);
}

static void a_used_ring_that_is_logged_past_the_end(void)
{
    const uint64_t addresses[] = {UINT64_MAX - 3, UINT64_C(1) << 63,
                                  GUEST_BASE + 4 * GUEST_SIZE + 64 * PAGE};

    for (size_t i = 0; i < ARRAY_SIZE(addresses); i++) {
        struct disk d;
        struct vhost_log *log = log_of_guest();
        disk_open(&d, &disk_kinds[0]);
        set_log(&d.control, d.queue, log, addresses[i]);
        set_desc(d.ring.desc, 0, buffer_addr(&d.ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
        driver_send(&d.ring, 0);
        CHECK_EQ(await_event(&d.control, VHOST_EVENT_BROKEN, 1000).value, VHOST_FAULT_LOG);
        disk_close(&d);
        vhost_log_unref(log);
    }
}

static void a_log_that_is_truncated_breaks_the_queue(void)
{
    struct disk d;
    struct vhost_log *log;
    int fd = log_file(PAGE);

    disk_open(&d, &disk_kinds[0]);
    CHECK_EQ(vhost_log_map(fd, 0, PAGE, &log), 0);
    set_log(&d.control, d.queue, log, d.ring.base + AT_USED);
    CHECK_OK(disk_read(&d, 0, SECTOR), SECTOR);
    CHECK_EQ(ftruncate(fd, 0), 0);
    driver_send(&d.ring, 0);
    CHECK_EQ(await_event(&d.control, VHOST_EVENT_BROKEN, 1000).value, VHOST_FAULT_LOG);
    vhost_log_unref(log);
    close(fd);
    disk_close(&d);
}

static const struct test tests[] = {
    TEST(bits_are_taken_once_and_added),
    TEST(what_is_not_in_the_log_cannot_be_taken),
    TEST(a_file_that_is_no_log),
    TEST(requests_are_logged_on_every_disk),
    TEST(a_read_that_fails_in_the_middle_is_logged),
#ifndef PACKED_RINGS /* theirs is in test_ring_packed.c */
    TEST(the_used_ring_is_logged_where_it_was_told),
#endif
    TEST(a_queue_can_start_with_a_log),
    TEST(a_log_that_is_too_short_breaks_the_queue),
    TEST(a_used_ring_that_is_logged_past_the_end),
    TEST(a_log_that_is_truncated_breaks_the_queue),
};
MAIN(tests)
