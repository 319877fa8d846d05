/* The load generator against the block device: many requests in flight, every byte checked. */
#include "disk.h"

enum { LOAD_AT = 0x40000, QUEUE = 64 };

static struct vhost_load_config load_of(struct disk *d, uint32_t flags)
{
    return (struct vhost_load_config){
        .memory = d->guest.host,
        .memory_size = d->guest.size,
        .guest_addr = GUEST_BASE,
        .desc = d->ring.base + AT_DESC,
        .avail = d->ring.base + AT_AVAIL,
        .used = d->ring.base + AT_USED,
        .buffers = d->ring.base + LOAD_AT,
        .span = DISK_SIZE,
        .requests = 3000,
        .seed = 42,
        .flags = flags | (LAYOUT ? VHOST_LOAD_PACKED : 0),
        .queue_size = QUEUE,
        .depth = 16,
        .block_size = 4096,
        .write_percent = 40,
        .stall_ms = PATIENCE_MS,
        .kick_fd = d->ring.kick,
        .call_fd = d->ring.call,
        .cpu = -1,
    };
}

static void run_load(const struct disk_kind *kind, uint64_t features, uint32_t flags,
                     uint32_t block_size)
{
    struct vhost_load_result result;
    struct disk d;

    disk_open_features(&d, kind, 0, BLK_FEATURES | features);
    struct vhost_load_config load = load_of(&d, flags | VHOST_LOAD_VERIFY);
    load.block_size = block_size;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    CHECK_EQ(result.requests, load.requests);
    CHECK_EQ(result.bytes, load.requests * block_size);
    CHECK_EQ(result.errors, 0);
    CHECK_EQ(result.corrupt, 0);
    /* Once more over what is there already: a run leaves the ring idle and stamps that last. */
    load.write_percent = 0;
    load.requests = DISK_SIZE / block_size;
    load.flags &= ~(uint32_t)VHOST_LOAD_RANDOM;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    CHECK_EQ(result.corrupt, 0);
    disk_close(&d);
}

static void every_engine_keeps_every_byte(void)
{
    for (size_t i = 0; i < ARRAY_SIZE(disk_kinds); i++)
        run_load(&disk_kinds[i], EVENT_IDX | INDIRECT,
                 VHOST_LOAD_RANDOM | VHOST_LOAD_EVENT_IDX | VHOST_LOAD_INDIRECT, 4096);
    for (size_t i = 0; i < ARRAY_SIZE(disk_kinds); i++)
        run_load(&disk_kinds[i], EVENT_IDX | INDIRECT | IN_ORDER,
                 VHOST_LOAD_RANDOM | VHOST_LOAD_EVENT_IDX | VHOST_LOAD_INDIRECT |
                     VHOST_LOAD_IN_ORDER,
                 4096);
}

static void sizes_of_a_sector_and_of_many(void)
{
    run_load(&disk_kinds[2], EVENT_IDX, VHOST_LOAD_RANDOM | VHOST_LOAD_EVENT_IDX, 512);
    run_load(&disk_kinds[2], EVENT_IDX, VHOST_LOAD_RANDOM | VHOST_LOAD_EVENT_IDX, 32768);
}

static void every_way_to_wait_and_to_describe(void)
{
    for (uint32_t way = 0; way < 16; way++) {
        uint64_t features =
            (way & 1 ? EVENT_IDX : 0) | (way & 2 ? INDIRECT : 0) | (way & 8 ? IN_ORDER : 0);
        uint32_t flags = (way & 1 ? VHOST_LOAD_EVENT_IDX : 0) |
                         (way & 2 ? VHOST_LOAD_INDIRECT : 0) | (way & 4 ? VHOST_LOAD_POLL : 0) |
                         (way & 8 ? VHOST_LOAD_IN_ORDER : 0);
        run_load(&disk_kinds[0], features, flags | VHOST_LOAD_RANDOM, 4096);
    }
}

/* The generator must be able to fail. */
static void a_corrupt_image_is_noticed(void)
{
    struct vhost_load_result result;
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    struct vhost_load_config load = load_of(&d, VHOST_LOAD_VERIFY);
    load.write_percent = 100;
    load.requests = DISK_SIZE / 4096;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    image_fill(&d, 17, 0xa5, SECTOR);
    load.write_percent = 0;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    CHECK_EQ(result.corrupt, 1);
    /* Two sectors in each other's place are well-formed, and wrong. */
    char swap[2][SECTOR];
    CHECK_EQ(pread(d.beside, swap, sizeof(swap), 0), (ssize_t)sizeof(swap));
    CHECK_EQ(pwrite(d.beside, swap[1], SECTOR, 0), SECTOR);
    CHECK_EQ(pwrite(d.beside, swap[0], SECTOR, SECTOR), SECTOR);
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    CHECK_EQ(result.corrupt, 3);
    disk_close(&d);
}

/* Two loads on one disk, an area each: neither sees nor touches the other's. */
static void a_load_keeps_to_its_area(void)
{
    struct vhost_load_result result;
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    struct vhost_load_config load = load_of(&d, VHOST_LOAD_VERIFY);
    load.write_percent = 100;
    load.span = DISK_SIZE / 2;
    load.requests = DISK_SIZE / 2 / 4096;
    load.start = DISK_SIZE / 2;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    char sector[SECTOR];
    CHECK_EQ(pread(d.beside, sector, sizeof(sector), DISK_SIZE / 2 - SECTOR), SECTOR);
    for (int i = 0; i < SECTOR; i++)
        CHECK_EQ(sector[i], 0);
    /* The stamps are those of the sectors' own numbers: a load on the whole disk knows them. */
    load = load_of(&d, VHOST_LOAD_VERIFY);
    load.write_percent = 0;
    load.requests = DISK_SIZE / 4096;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    CHECK_EQ(result.corrupt, 0);
    CHECK_EQ(pread(d.beside, sector, sizeof(sector), DISK_SIZE / 2), SECTOR);
    CHECK(memcmp(sector, (char[SECTOR]){0}, SECTOR) != 0);
    disk_close(&d);
}

static void errors_are_counted(void)
{
    struct vhost_load_result result;
    struct disk d;

    disk_open_features(&d, &disk_kinds[0], VHOST_BLK_READ_ONLY, BLK_FEATURES);
    struct vhost_load_config load = load_of(&d, 0);
    load.write_percent = 100;
    load.requests = 100;
    CHECK_EQ(vhost_driver_run(&load, &result), 0);
    CHECK_EQ(result.requests, 100);
    CHECK_EQ(result.errors, 100);
    CHECK_EQ(result.bytes, 0);
    disk_close(&d);
}

static void a_device_that_does_not_answer_is_given_up(void)
{
    for (uint32_t poll = 0; poll <= VHOST_LOAD_POLL; poll += VHOST_LOAD_POLL) {
        struct vhost_load_result result;
        struct disk d;
        disk_open(&d, &disk_kinds[0]);
        queue_halt(&d.control, d.queue);
        struct vhost_load_config load = load_of(&d, poll);
        load.stall_ms = 1;
        CHECK_EQ(vhost_driver_run(&load, &result), -ETIMEDOUT);
        CHECK_EQ(result.requests, 0);
        if (!LAYOUT)                                             /* a packed ring does not tell */
            CHECK_EQ(vhost_driver_run(&load, &result), -EINVAL); /* the ring is not idle now */
        queue_run(&d.control, d.queue);
        disk_close(&d);
    }
}

static void a_wrong_load_is_refused(void)
{
    struct vhost_load_result result;
    struct disk d;

    disk_open(&d, &disk_kinds[0]);
    const struct vhost_load_config good = load_of(&d, 0);
    struct vhost_load_config c;
#define REFUSED(change)                                                                            \
    do {                                                                                           \
        c = good;                                                                                  \
        change;                                                                                    \
        CHECK_EQ(vhost_driver_run(&c, &result), -EINVAL);                                          \
    } while (0)
    REFUSED(c.depth = 0);
    REFUSED(c.depth = QUEUE / 3 + 1);
    REFUSED(c.queue_size = 63);
    REFUSED(c.block_size = 100);
    REFUSED(c.span = 512);
    REFUSED(c.start = 1);
    REFUSED(c.write_percent = 101);
    REFUSED(c.requests = 0);
    REFUSED(c.call_fd = -1);
    REFUSED(c.buffers += 1);
    REFUSED(c.buffers = GUEST_BASE + d.guest.size - 4096);
    REFUSED(c.desc = 0);
    REFUSED(c.cpu = 1 << 20);
    disk_close(&d);
}

static void a_ping_needs_two_cpus(void)
{
    double ns = 0;

    CHECK_EQ(vhost_driver_ping(0, 0, 10, &ns), -EINVAL);
    CHECK_EQ(vhost_driver_ping(0, 1, 0, &ns), -EINVAL);
    CHECK_EQ(vhost_driver_ping(0, 1023, 10, &ns), -EINVAL);
    if (sysconf(_SC_NPROCESSORS_ONLN) > 1) {
        CHECK_EQ(vhost_driver_ping(0, 1, 3, &ns), 0);
        CHECK(ns > 0);
    }
}

static const struct test tests[] = {
    TEST(every_engine_keeps_every_byte),
    TEST(sizes_of_a_sector_and_of_many),
    TEST(every_way_to_wait_and_to_describe),
    TEST(a_corrupt_image_is_noticed),
    TEST(a_load_keeps_to_its_area),
    TEST(errors_are_counted),
    TEST(a_device_that_does_not_answer_is_given_up),
    TEST(a_wrong_load_is_refused),
    TEST(a_ping_needs_two_cpus),
};
MAIN(tests)
