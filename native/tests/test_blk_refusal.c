/* Block requests that are wrong: each gets its status, and the image stays as it was. */
#include "disk.h"

static void sectors_outside(struct disk *d)
{
    static const struct {
        uint64_t sector;
        uint32_t len;
    } wrong[] = {
        {DISK_SECTORS, SECTOR},
        {DISK_SECTORS - 1, 2 * SECTOR},
        {DISK_SECTORS + 1, SECTOR},
        {UINT64_C(1) << 55, SECTOR},
        {(UINT64_C(1) << 55) - 1, 2 * SECTOR},
        {UINT64_MAX, SECTOR},
        {UINT64_MAX, 8 * SECTOR},
    };
    for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
        CHECK_IOERR(disk_read(d, wrong[i].sector, wrong[i].len));
        CHECK_IOERR(disk_write(d, wrong[i].sector, wrong[i].len));
    }
    struct stat st;
    CHECK_EQ(fstat(d->beside, &st), 0);
    CHECK_EQ(st.st_size, DISK_SIZE);
}

static void sectors_outside_the_disk(void)
{
    on_every_disk(sectors_outside);
}

/* Each segment lies inside; their sum does not. */
static void bounds_are_of_the_sum_of_segments(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    struct vring_desc *t = d.ring.desc;
    set_header(&d, VIRTIO_BLK_T_OUT, DISK_SECTORS - 1);
    set_desc(t, 0, buffer_addr(&d.ring, HEADER), 16, VRING_DESC_F_NEXT, 1);
    set_desc(t, 1, buffer_addr(&d.ring, DATA), SECTOR, VRING_DESC_F_NEXT, 2);
    set_desc(t, 2, buffer_addr(&d.ring, DATA), SECTOR, VRING_DESC_F_NEXT, 3);
    set_desc(t, 3, buffer_addr(&d.ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&d.ring, 0);
    CHECK_IOERR(await_answer(&d));
    disk_close(&d);
}

static void lengths_that_are_not_sectors(void)
{
    static const uint32_t len[] = {1, 511, 513, 4095};
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    for (size_t i = 0; i < ARRAY_SIZE(len); i++) {
        CHECK_IOERR(disk_read(&d, 0, len[i]));
        CHECK_IOERR(disk_write(&d, 0, len[i]));
    }
    disk_close(&d);
}

static void data_in_the_wrong_direction(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    CHECK_IOERR(request(&d, VIRTIO_BLK_T_IN, 0, SECTOR, false));
    CHECK_IOERR(request(&d, VIRTIO_BLK_T_OUT, 0, SECTOR, true));
    disk_close(&d);
}

static void a_header_that_is_too_short(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    set_header(&d, VIRTIO_BLK_T_FLUSH, 0);
    set_desc(d.ring.desc, 0, buffer_addr(&d.ring, HEADER), 15, VRING_DESC_F_NEXT, 1);
    set_desc(d.ring.desc, 1, buffer_addr(&d.ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&d.ring, 0);
    CHECK_IOERR(await_answer(&d));
    disk_close(&d);
}

/* No place for a status: dropped, and the head returned with length 0. */
static void a_request_without_a_status_byte(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    image_fill(&d, 0, 0x31, SECTOR);
    set_header(&d, VIRTIO_BLK_T_OUT, 0);
    set_desc(d.ring.desc, 0, buffer_addr(&d.ring, HEADER), 16, 0, 0);
    driver_send(&d.ring, 0);
    CHECK_ANSWER(await_answer(&d), -1, 0);
    set_desc(d.ring.desc, 0, buffer_addr(&d.ring, HEADER), 16, VRING_DESC_F_NEXT, 1);
    set_desc(d.ring.desc, 1, buffer_addr(&d.ring, DATA), SECTOR, VRING_DESC_F_NEXT, 2);
    set_desc(d.ring.desc, 2, buffer_addr(&d.ring, STATUS), 1, 0, 0);
    driver_send(&d.ring, 0);
    CHECK_ANSWER(await_answer(&d), -1, 0);
    CHECK(image_is(&d, 0, 0x31, SECTOR));
    disk_close(&d);
}

static void types_that_nobody_knows(void)
{
    static const uint32_t type[] = {2,  3,  5,  6,  7,          9,          10,
                                    12, 14, 15, 26, 0x80000000, 0x80000001, UINT32_MAX};
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    for (size_t i = 0; i < ARRAY_SIZE(type); i++) {
        CHECK_UNSUPP(request(&d, type[i], 0, 0, false));
        CHECK_UNSUPP(request(&d, type[i], 0, SECTOR, true));
        CHECK_UNSUPP(request(&d, type[i], 0, SECTOR, false));
    }
    disk_close(&d);
}

static void ids_of_a_wrong_length(void)
{
    static const uint32_t len[] = {1, 19, 21, 512};
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    for (size_t i = 0; i < ARRAY_SIZE(len); i++)
        CHECK_IOERR(request(&d, VIRTIO_BLK_T_GET_ID, 0, len[i], true));
    CHECK_IOERR(request(&d, VIRTIO_BLK_T_GET_ID, 0, 0, true));
    CHECK_IOERR(request(&d, VIRTIO_BLK_T_GET_ID, 0, 20, false));
    disk_close(&d);
}

/* ---- ranges ---- */

static void ranges_that_are_wrong(void)
{
    static const uint32_t type[] = {VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};
    static const struct virtio_blk_range wrong[] = {
        {.sector = 0, .num_sectors = 0},
        {.sector = 0, .num_sectors = MAX_RANGE_SECTORS + 1},
        {.sector = 0, .num_sectors = UINT32_MAX},
        {.sector = DISK_SECTORS, .num_sectors = 1},
        {.sector = DISK_SECTORS - 1, .num_sectors = 2},
        {.sector = UINT64_MAX, .num_sectors = 2},
        {.sector = UINT64_C(1) << 55, .num_sectors = 1},
    };
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    image_fill(&d, 0, 0x41, DISK_SIZE);
    for (size_t t = 0; t < ARRAY_SIZE(type); t++) {
        for (size_t i = 0; i < ARRAY_SIZE(wrong); i++) {
            struct virtio_blk_range both[2] = {{.sector = 0, .num_sectors = 1}, wrong[i]};
            CHECK_IOERR(disk_ranges(&d, type[t], &wrong[i], 1));
            CHECK_IOERR(disk_ranges(&d, type[t], both, 2));
        }
        struct virtio_blk_range many[MAX_RANGES + 1];
        for (uint32_t i = 0; i <= MAX_RANGES; i++)
            many[i] = (struct virtio_blk_range){.sector = i, .num_sectors = 1};
        CHECK_IOERR(disk_ranges(&d, type[t], many, MAX_RANGES + 1));
        CHECK_IOERR(request(&d, type[t], 0, 0, false));
        CHECK_IOERR(request(&d, type[t], 0, 15, false));
        CHECK_IOERR(request(&d, type[t], 0, 17, false));
    }
    CHECK(image_is(&d, 0, 0x41, DISK_SIZE));
    disk_close(&d);
}

/* Virtio 1.3, section 5.2.6.2: unmap on a discard, and unknown flags, are UNSUPP. */
static void range_flags_that_are_not_supported(void)
{
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    image_fill(&d, 0, 0x42, SECTOR);
    for (uint32_t flags = 1; flags; flags <<= 1) {
        struct virtio_blk_range range = {.sector = 0, .num_sectors = 1, .flags = flags};
        CHECK_UNSUPP(disk_ranges(&d, VIRTIO_BLK_T_DISCARD, &range, 1));
        if (flags != VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP)
            CHECK_UNSUPP(disk_ranges(&d, VIRTIO_BLK_T_WRITE_ZEROES, &range, 1));
    }
    CHECK(image_is(&d, 0, 0x42, SECTOR));
    disk_close(&d);
}

static void a_range_over_two_descriptors_is_legal(void)
{
    struct disk d;
    struct virtio_blk_range range = {.sector = 1, .num_sectors = 2};

    disk_open(&d, &disk_kinds[0]);
    image_fill(&d, 0, 0x43, 4 * SECTOR);
    struct vring_desc *t = d.ring.desc;
    set_header(&d, VIRTIO_BLK_T_WRITE_ZEROES, 0);
    memcpy(disk_data(&d), &range, sizeof(range));
    set_desc(t, 0, buffer_addr(&d.ring, HEADER), 16, VRING_DESC_F_NEXT, 1);
    set_desc(t, 1, buffer_addr(&d.ring, DATA), 5, VRING_DESC_F_NEXT, 2);
    set_desc(t, 2, buffer_addr(&d.ring, DATA + 5), 11, VRING_DESC_F_NEXT, 3);
    set_desc(t, 3, buffer_addr(&d.ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&d.ring, 0);
    CHECK_OK(await_answer(&d), 0);
    CHECK(image_is(&d, 0, 0x43, SECTOR));
    CHECK(image_is(&d, 1, 0, 2 * SECTOR));
    CHECK(image_is(&d, 3, 0x43, SECTOR));
    disk_close(&d);
}

static void ranges_that_were_not_negotiated(void)
{
    struct virtio_blk_range range = {.sector = 0, .num_sectors = 1};
    struct disk d;

    disk_open_features(&d, &disk_kinds[0], 0, 0);
    CHECK_UNSUPP(disk_ranges(&d, VIRTIO_BLK_T_DISCARD, &range, 1));
    CHECK_UNSUPP(disk_ranges(&d, VIRTIO_BLK_T_WRITE_ZEROES, &range, 1));
    CHECK_UNSUPP(disk_ranges(&d, VIRTIO_BLK_T_SECURE_ERASE, &range, 1));
    disk_close(&d);
}

/* ---- disks that refuse ---- */

static void a_read_only_disk_is_never_written(void)
{
    struct virtio_blk_range range = {.sector = 0, .num_sectors = 1};
    struct disk d;

    disk_open_features(&d, &disk_kinds[0], VHOST_BLK_READ_ONLY, BLK_FEATURES);
    image_fill(&d, 0, 0x51, SECTOR);
    memset(disk_data(&d), 0, SECTOR);
    CHECK_IOERR(disk_write(&d, 0, SECTOR));
    CHECK_IOERR(disk_ranges(&d, VIRTIO_BLK_T_DISCARD, &range, 1));
    CHECK_IOERR(disk_ranges(&d, VIRTIO_BLK_T_WRITE_ZEROES, &range, 1));
    CHECK_OK(request(&d, VIRTIO_BLK_T_FLUSH, 0, 0, false), 0);
    CHECK_OK(disk_read(&d, 0, SECTOR), SECTOR);
    CHECK(image_is(&d, 0, 0x51, SECTOR));
    disk_close(&d);
}

static void shortened(struct disk *d)
{
    CHECK_EQ(ftruncate(d->beside, DISK_SIZE / 2), 0);
    CHECK_IOERR(disk_read(d, DISK_SECTORS / 2, 4096));
    CHECK_IOERR(disk_read(d, DISK_SECTORS / 2 - 8, 8192)); /* half of it is there */
    CHECK_OK(disk_read(d, DISK_SECTORS / 2 - 8, 4096), 4096);
}

static void an_image_shorter_than_its_disk(void)
{
    on_every_disk(shortened);
}

static void a_wrong_device_config_is_refused(void)
{
    struct vhost_blk_config config = {.flags = VHOST_BLK_NULL, .num_queues = 1, .seg_max = 1};
    struct vhost_device *device = NULL;

    config.num_queues = 0;
    CHECK_EQ(vhost_blk_new(&config, &device), -EINVAL);
    config.num_queues = 1;
    config.flags = 0;
    config.fd = 12345;
    CHECK(vhost_blk_new(&config, &device) < 0);
    CHECK(device == NULL);
}

static const struct test tests[] = {
    TEST(sectors_outside_the_disk),
    TEST(bounds_are_of_the_sum_of_segments),
    TEST(lengths_that_are_not_sectors),
    TEST(data_in_the_wrong_direction),
    TEST(a_header_that_is_too_short),
    TEST(a_request_without_a_status_byte),
    TEST(types_that_nobody_knows),
    TEST(ids_of_a_wrong_length),
    TEST(ranges_that_are_wrong),
    TEST(range_flags_that_are_not_supported),
    TEST(a_range_over_two_descriptors_is_legal),
    TEST(ranges_that_were_not_negotiated),
    TEST(a_read_only_disk_is_never_written),
    TEST(an_image_shorter_than_its_disk),
    TEST(a_wrong_device_config_is_refused),
};
MAIN(tests)
