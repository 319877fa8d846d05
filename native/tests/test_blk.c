/* Block requests that are right, on every engine: what is read, written, and told of it. */
#include "disk.h"

static void write_then_read(struct disk *d)
{
    memset(disk_data(d), 0x11, 4096);
    CHECK_OK(disk_write(d, 8, 4096), 0);
    memset(disk_data(d), 0x22, SECTOR);
    CHECK_OK(disk_write(d, 9, SECTOR), 0);
    CHECK(image_is(d, 8, 0x11, SECTOR));
    CHECK(image_is(d, 9, 0x22, SECTOR));
    CHECK(image_is(d, 10, 0x11, SECTOR));
    CHECK(image_is(d, 16, 0, SECTOR));
    memset(disk_data(d), 0xff, 3 * SECTOR + 1);
    CHECK_OK(disk_read(d, 8, 3 * SECTOR), 3 * SECTOR);
    char *data = disk_data(d);
    CHECK(all_bytes_are(data, 0x11, SECTOR));
    CHECK(all_bytes_are(data + SECTOR, 0x22, SECTOR));
    CHECK(all_bytes_are(data + 2 * SECTOR, 0x11, SECTOR));
    CHECK(all_bytes_are(data + 3 * SECTOR, 0xff, 1));
}

static void what_was_written_is_read(void)
{
    on_every_disk(write_then_read);
}

static void whole_disk(struct disk *d)
{
    CHECK_OK(disk_read(d, 0, DISK_SIZE), DISK_SIZE);
    CHECK(all_bytes_are(disk_data(d), 0, DISK_SIZE));
    memset(disk_data(d), 0x77, DISK_SIZE);
    CHECK_OK(disk_write(d, 0, DISK_SIZE), 0);
    CHECK(image_is(d, 0, 0x77, DISK_SIZE));
}

static void one_request_may_be_the_whole_disk(void)
{
    on_every_disk(whole_disk);
}

static void first_and_last(struct disk *d)
{
    image_fill(d, DISK_SECTORS - 1, 0x33, SECTOR);
    CHECK_OK(disk_read(d, DISK_SECTORS - 1, SECTOR), SECTOR);
    CHECK(all_bytes_are(disk_data(d), 0x33, SECTOR));
    CHECK_OK(disk_read(d, 0, SECTOR), SECTOR);
    CHECK(all_bytes_are(disk_data(d), 0, SECTOR));
}

static void the_first_and_last_sectors_are_served(void)
{
    on_every_disk(first_and_last);
}

static void flushes(struct disk *d)
{
    CHECK_OK(request(d, VIRTIO_BLK_T_FLUSH, 0, 0, false), 0);
    CHECK_OK(request(d, VIRTIO_BLK_T_FLUSH, 99999, 0, false), 0);
    vhost_blk_set_writeback(d->device, false);
    memset(disk_data(d), 0x44, 4096);
    CHECK_OK(disk_write(d, 0, 4096), 0);
    CHECK(image_is(d, 0, 0x44, 4096));
    CHECK_OK(request(d, VIRTIO_BLK_T_FLUSH, 0, 0, false), 0);
}

static void flush_succeeds_and_write_through_writes(void)
{
    on_every_disk(flushes);
}

static void the_id_is_20_bytes(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    memset(disk_data(&d), 0xff, 32);
    CHECK_OK(request(&d, VIRTIO_BLK_T_GET_ID, 0, 20, true), 20);
    CHECK(memcmp(disk_data(&d), "serial of the disk\0\0\xff", 21) == 0);
    disk_close(&d);
}

static blkcnt_t blocks_of(struct disk *d)
{
    struct stat st;

    CHECK_EQ(fsync(d->beside), 0);
    CHECK_EQ(fstat(d->beside, &st), 0);
    return st.st_blocks;
}

static void discards(struct disk *d)
{
    struct virtio_blk_range range[2] = {{.sector = 0, .num_sectors = 1024},
                                        {.sector = 1032, .num_sectors = 1016}};

    image_fill(d, 0, 0x55, DISK_SIZE);
    blkcnt_t before = blocks_of(d);
    CHECK_OK(disk_ranges(d, VIRTIO_BLK_T_DISCARD, range, 2), 0);
    CHECK(blocks_of(d) < before / 4);
    CHECK(image_is(d, 0, 0, 1024 * SECTOR));
    CHECK(image_is(d, 1024, 0x55, 8 * SECTOR));
    CHECK(image_is(d, 1032, 0, 1016 * SECTOR));
}

static void discard_makes_holes(void)
{
    on_every_disk(discards);
}

static void zeroes(struct disk *d)
{
    for (uint32_t unmap = 0; unmap < 2; unmap++) {
        struct virtio_blk_range range[2] = {
            {.sector = 3, .num_sectors = 5, .flags = unmap},
            {.sector = 100, .num_sectors = 1024, .flags = unmap},
        };
        image_fill(d, 0, 0x66, DISK_SIZE);
        CHECK_OK(disk_ranges(d, VIRTIO_BLK_T_WRITE_ZEROES, range, 2), 0);
        CHECK(image_is(d, 0, 0x66, 3 * SECTOR));
        CHECK(image_is(d, 3, 0, 5 * SECTOR));
        CHECK(image_is(d, 8, 0x66, 92 * SECTOR));
        CHECK(image_is(d, 100, 0, 1024 * SECTOR));
        CHECK(image_is(d, 1124, 0x66, SECTOR));
    }
}

static void write_zeroes_writes_zeroes_and_nothing_beside(void)
{
    on_every_disk(zeroes);
}

/* ---- framing: any is legal (virtio 1.3, section 2.7.4) ---- */

static void scattered(struct disk *d)
{
    struct vring_desc *t = d->ring.desc;
    uint64_t base = buffer_addr(&d->ring, 0);
    uint16_t n = 0;

    /* 16 descriptors of one byte for the header, odd pieces of data, the status alone. */
    image_fill(d, 5, 0x12, 2 * SECTOR);
    set_header(d, VIRTIO_BLK_T_IN, 5);
    for (; n < 16; n++)
        set_desc(t, n, base + HEADER + n, 1, VRING_DESC_F_NEXT, n + 1);
    uint32_t piece[] = {1, 510, 13, 500};
    uint64_t at = base + DATA + 1;
    for (size_t i = 0; i < ARRAY_SIZE(piece); i++, n++) {
        set_desc(t, n, at, piece[i], VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, n + 1);
        at += piece[i];
    }
    set_desc(t, n, base + STATUS, 1, VRING_DESC_F_WRITE, 0);
    memset(disk_data(d), 0, 2 * SECTOR + 2);
    driver_send(&d->ring, 0);
    CHECK_OK(await_answer(d), 2 * SECTOR);
    char *data = disk_data(d);
    CHECK(all_bytes_are(data, 0, 1));
    CHECK(all_bytes_are(data + 1, 0x12, 2 * SECTOR));
    CHECK(all_bytes_are(data + 1 + 2 * SECTOR, 0, 1));
}

static void a_request_in_pieces(void)
{
    on_every_disk(scattered);
}

static void joined(struct disk *d)
{
    struct vring_desc *t = d->ring.desc;
    char *page = buffer_at(&d->ring, DATA);
    uint64_t addr = buffer_addr(&d->ring, DATA);

    /* Header and data in one buffer, to be written. */
    set_header(d, VIRTIO_BLK_T_OUT, 7);
    memcpy(page, buffer_at(&d->ring, HEADER), 16);
    memset(page + 16, 0x21, SECTOR);
    set_desc(t, 0, addr, 16 + SECTOR, VRING_DESC_F_NEXT, 1);
    set_desc(t, 1, buffer_addr(&d->ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&d->ring, 0);
    CHECK_OK(await_answer(d), 0);
    CHECK(image_is(d, 7, 0x21, SECTOR));
    /* Data and status in one buffer, to be read. */
    set_header(d, VIRTIO_BLK_T_IN, 7);
    memset(page, 0xee, 2 * SECTOR);
    set_desc(t, 0, buffer_addr(&d->ring, HEADER), 16, VRING_DESC_F_NEXT, 1);
    set_desc(t, 1, addr, SECTOR + 1, VRING_DESC_F_WRITE, 0);
    driver_send(&d->ring, 0);
    CHECK_EQ(driver_take(&d->ring).len, SECTOR + 1);
    CHECK(all_bytes_are(page, 0x21, SECTOR));
    CHECK_EQ(page[SECTOR], VIRTIO_BLK_S_OK);
    CHECK(all_bytes_are(page + SECTOR + 1, 0xee, 1));
}

static void a_request_in_two_buffers(void)
{
    on_every_disk(joined);
}

static void as_many_segments_as_seg_max(void)
{
    for (uint32_t extra = 0; extra < 2; extra++) {
        struct disk d;
        disk_open(&d, &disk_kinds[0]);
        struct vring_desc *t = d.ring.desc;
        uint16_t n = 1;
        set_header(&d, VIRTIO_BLK_T_IN, 0);
        set_desc(t, 0, buffer_addr(&d.ring, HEADER), 16, VRING_DESC_F_NEXT, 1);
        for (; n <= SEG_MAX + extra; n++)
            set_desc(t, n, buffer_addr(&d.ring, DATA), SECTOR,
                     VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, n + 1);
        set_desc(t, n, buffer_addr(&d.ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
        driver_send(&d.ring, 0);
        if (extra)
            CHECK_IOERR(await_answer(&d));
        else
            CHECK_OK(await_answer(&d), SEG_MAX * SECTOR);
        disk_close(&d);
    }
}

/* ---- other disks ---- */

static void a_null_disk_reads_zeroes(void)
{
    static const struct disk_kind null = {"null", true, 0, VHOST_BLK_NULL, 0};
    struct disk d;

    disk_open(&d, &null);
    memset(disk_data(&d), 0xff, 8192);
    CHECK_OK(disk_write(&d, 0, 4096), 0);
    CHECK_OK(disk_read(&d, 0, 4096), 4096);
    CHECK(all_bytes_are(disk_data(&d), 0, 4096));
    CHECK_OK(request(&d, VIRTIO_BLK_T_FLUSH, 0, 0, false), 0);
    CHECK_IOERR(disk_read(&d, DISK_SECTORS, SECTOR));
    struct virtio_blk_range range = {.sector = 0, .num_sectors = 8};
    CHECK_OK(disk_ranges(&d, VIRTIO_BLK_T_DISCARD, &range, 1), 0);
    CHECK_OK(disk_ranges(&d, VIRTIO_BLK_T_WRITE_ZEROES, &range, 1), 0);
    disk_close(&d);
}

static void the_capacity_may_change_while_running(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    CHECK_OK(disk_read(&d, 100, SECTOR), SECTOR);
    vhost_blk_set_capacity(d.device, 100);
    CHECK_IOERR(disk_read(&d, 100, SECTOR));
    CHECK_OK(disk_read(&d, 99, SECTOR), SECTOR);
    vhost_blk_set_capacity(d.device, DISK_SECTORS);
    CHECK_OK(disk_read(&d, 100, SECTOR), SECTOR);
    disk_close(&d);
}

static void counters_tell_what_was_done(void)
{
    struct vhost_stats s;
    struct disk d;
    uint64_t latencies = 0;

    disk_open(&d, &disk_kinds[2]);
    CHECK_OK(disk_read(&d, 0, 4096), 4096);
    CHECK_OK(disk_write(&d, 0, 8192), 0);
    CHECK_OK(disk_write(&d, 0, 512), 0);
    CHECK_OK(request(&d, VIRTIO_BLK_T_FLUSH, 0, 0, false), 0);
    CHECK_IOERR(disk_read(&d, DISK_SECTORS, SECTOR));
    CHECK_UNSUPP(request(&d, 1234, 0, 0, false));
    queue_sync(&d.control, d.queue);
    CHECK_EQ(vhost_device_read_stats(d.device, 0, &s), 0);
    CHECK_EQ(s.counter[VHOST_COUNTER_REQUESTS], 6);
    CHECK_EQ(s.counter[VHOST_COUNTER_COMPLETIONS], 6);
    CHECK_EQ(s.counter[VHOST_COUNTER_READS], 1);
    CHECK_EQ(s.counter[VHOST_COUNTER_WRITES], 2);
    CHECK_EQ(s.counter[VHOST_COUNTER_FLUSHES], 1);
    CHECK_EQ(s.counter[VHOST_COUNTER_BYTES_READ], 4096);
    CHECK_EQ(s.counter[VHOST_COUNTER_BYTES_WRITTEN], 8704);
    CHECK_EQ(s.counter[VHOST_COUNTER_ERRORS], 1);
    CHECK_EQ(s.counter[VHOST_COUNTER_UNSUPPORTED], 1);
    for (unsigned i = 0; i < VHOST_HISTOGRAM_BUCKETS; i++)
        latencies += s.latency[i];
    CHECK_EQ(latencies, 6);
    disk_close(&d);
}

static const struct test tests[] = {
    TEST(what_was_written_is_read),
    TEST(one_request_may_be_the_whole_disk),
    TEST(the_first_and_last_sectors_are_served),
    TEST(flush_succeeds_and_write_through_writes),
    TEST(the_id_is_20_bytes),
    TEST(discard_makes_holes),
    TEST(write_zeroes_writes_zeroes_and_nothing_beside),
    TEST(a_request_in_pieces),
    TEST(a_request_in_two_buffers),
    TEST(as_many_segments_as_seg_max),
    TEST(a_null_disk_reads_zeroes),
    TEST(the_capacity_may_change_while_running),
    TEST(counters_tell_what_was_done),
};
MAIN(tests)
