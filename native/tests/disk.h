/* A block device with one queue, and a driver that sends it requests of any shape. */
#ifndef DISK_H
#define DISK_H

#include "rig.h"
#include <sys/stat.h>

enum {
    SECTOR = 512,
    DISK_SECTORS = 2048,
    DISK_SIZE = DISK_SECTORS * SECTOR,
    MAX_RANGES = 4,
    MAX_RANGE_SECTORS = 1024,
    SEG_MAX = 30,
    /* Where a request lies in the ring's share of guest memory. */
    HEADER = 0,
    STATUS = 0x100,
    DATA = 0x1000,
};

#define BLK_FEATURES                                                                               \
    (UINT64_C(1) << VIRTIO_BLK_F_FLUSH | UINT64_C(1) << VIRTIO_BLK_F_DISCARD |                     \
     UINT64_C(1) << VIRTIO_BLK_F_WRITE_ZEROES)

/* What the image lies on, and who moves the data. */
struct disk_kind {
    const char *name;
    bool memfd; /* otherwise a file in $TMPDIR */
    int open_flags;
    uint32_t flags;
    uint32_t iothread_flags;
};

static const struct disk_kind disk_kinds[] = {
    {"memory", true, 0, 0, 0},
    {"memory, threads", true, 0, VHOST_BLK_THREADS, 0},
    {"file, io_uring", false, 0, 0, 0},
    {"file, threads", false, 0, VHOST_BLK_THREADS, 0},
    {"file, no io_uring", false, 0, 0, VHOST_IOTHREAD_NO_IO_URING},
    {"direct, io_uring", false, O_DIRECT, 0, 0},
    {"direct, threads", false, O_DIRECT, VHOST_BLK_THREADS, 0},
};

struct disk {
    struct guest guest;
    struct driver_ring ring;
    struct control control;
    struct vhost_device *device;
    struct vhost_queue *queue;
    int fd;     /* as the device has it */
    int beside; /* the same file, opened without O_DIRECT */
};

static inline void image_open(struct disk *d, const struct disk_kind *kind)
{
    char path[256];
    const char *directory = getenv("TMPDIR");

    if (kind->memfd) {
        d->fd = memfd_create("image", MFD_CLOEXEC);
        d->beside = dup(d->fd);
    } else {
        snprintf(path, sizeof(path), "%s/test_blk.XXXXXX", directory ? directory : "/var/tmp");
        d->beside = mkostemp(path, O_CLOEXEC);
        CHECK(d->beside >= 0);
        d->fd = open(path, O_RDWR | O_CLOEXEC | kind->open_flags);
        unlink(path);
    }
    CHECK(d->fd >= 0 && d->beside >= 0);
    CHECK_EQ(ftruncate(d->beside, DISK_SIZE), 0);
}

static inline void disk_open_features(struct disk *d, const struct disk_kind *kind, uint32_t flags,
                                      uint64_t features)
{
    *d = (struct disk){0};
    image_open(d, kind);
    struct vhost_blk_config config = {
        .fd = d->fd,
        .flags = kind->flags | flags,
        .capacity = DISK_SECTORS,
        .num_queues = 1,
        .seg_max = SEG_MAX,
        .max_discard_seg = MAX_RANGES,
        .max_discard_sectors = MAX_RANGE_SECTORS,
        .id = "serial of the disk",
    };
    CHECK_EQ(vhost_blk_new(&config, &d->device), 0);
    d->guest = guest_new(4 * GUEST_SIZE, 0);
    d->ring = driver_new(&d->guest, 0, 64, VERSION_1 | features, 0);
    d->control = control_new(kind->iothread_flags, 0);
    struct vhost_queue_config queue_config = driver_config(&d->ring, 0);
    CHECK_EQ(vhost_queue_new(&queue_config, d->device, d->guest.memory, &d->queue), 0);
    queue_run(&d->control, d->queue);
}

static inline void disk_open(struct disk *d, const struct disk_kind *kind)
{
    disk_open_features(d, kind, 0, BLK_FEATURES);
}

static inline void disk_close(struct disk *d)
{
    queue_halt(&d->control, d->queue);
    CHECK_EQ(vhost_queue_free(d->queue), 0);
    control_free(&d->control);
    vhost_device_free(d->device);
    driver_free(&d->ring);
    guest_free(&d->guest);
    close(d->fd);
    close(d->beside);
}

/* Runs `body` on every kind of disk, each time on a fresh one. */
static inline void on_every_disk(void (*body)(struct disk *d))
{
    for (size_t i = 0; i < ARRAY_SIZE(disk_kinds); i++) {
        struct disk d;
        disk_open(&d, &disk_kinds[i]);
        printf("# on %s\n", disk_kinds[i].name);
        body(&d);
        disk_close(&d);
    }
}

static inline void *disk_data(struct disk *d)
{
    return buffer_at(&d->ring, DATA);
}

static inline void set_header(struct disk *d, uint32_t type, uint64_t sector)
{
    struct virtio_blk_req_hdr *header = buffer_at(&d->ring, HEADER);

    *header = (struct virtio_blk_req_hdr){.type = type, .sector = sector};
    *(uint8_t *)buffer_at(&d->ring, STATUS) = 0xee;
}

struct answer {
    int status; /* -1: none was written */
    uint32_t used_len;
};

static inline struct answer await_answer(struct disk *d)
{
    struct vring_used_elem e = driver_take(&d->ring);
    uint8_t status = *(uint8_t *)buffer_at(&d->ring, STATUS);

    return (struct answer){.status = status == 0xee ? -1 : status, .used_len = e.len};
}

/* A request in the usual three descriptors, or two without data. */
static inline struct answer request(struct disk *d, uint32_t type, uint64_t sector, uint32_t len,
                                    bool writable)
{
    struct vring_desc *t = d->ring.desc;
    uint16_t data_flags = VRING_DESC_F_NEXT | (writable ? VRING_DESC_F_WRITE : 0);

    set_header(d, type, sector);
    set_desc(t, 0, buffer_addr(&d->ring, HEADER), 16, VRING_DESC_F_NEXT, len ? 1 : 2);
    set_desc(t, 1, buffer_addr(&d->ring, DATA), len, data_flags, 2);
    set_desc(t, 2, buffer_addr(&d->ring, STATUS), 1, VRING_DESC_F_WRITE, 0);
    driver_send(&d->ring, 0);
    return await_answer(d);
}

static inline struct answer disk_read(struct disk *d, uint64_t sector, uint32_t len)
{
    return request(d, VIRTIO_BLK_T_IN, sector, len, true);
}

static inline struct answer disk_write(struct disk *d, uint64_t sector, uint32_t len)
{
    return request(d, VIRTIO_BLK_T_OUT, sector, len, false);
}

static inline struct answer disk_ranges(struct disk *d, uint32_t type,
                                        const struct virtio_blk_range *range, uint32_t n)
{
    memcpy(disk_data(d), range, n * sizeof(*range));
    return request(d, type, 0, n * sizeof(*range), false);
}

#define CHECK_ANSWER(got, want_status, want_len)                                                   \
    do {                                                                                           \
        struct answer answer_ = (got);                                                             \
        CHECK_EQ(answer_.status, want_status);                                                     \
        CHECK_EQ(answer_.used_len, want_len);                                                      \
    } while (0)

#define CHECK_OK(got, data_len) CHECK_ANSWER(got, VIRTIO_BLK_S_OK, (data_len) + 1)
#define CHECK_IOERR(got) CHECK_ANSWER(got, VIRTIO_BLK_S_IOERR, 1)
#define CHECK_UNSUPP(got) CHECK_ANSWER(got, VIRTIO_BLK_S_UNSUPP, 1)

static inline bool all_bytes_are(const void *data, unsigned char byte, size_t len)
{
    const unsigned char *p = data;

    for (size_t i = 0; i < len; i++) {
        if (p[i] != byte)
            return false;
    }
    return true;
}

/* Fills part of the image behind the device's back. */
static inline void image_fill(struct disk *d, uint64_t sector, unsigned char byte, size_t len)
{
    char *data = malloc(len);

    CHECK(data != NULL);
    memset(data, byte, len);
    CHECK_EQ(pwrite(d->beside, data, len, (off_t)(sector * SECTOR)), (ssize_t)len);
    CHECK_EQ(fdatasync(d->beside), 0);
    free(data);
}

static inline bool image_is(struct disk *d, uint64_t sector, unsigned char byte, size_t len)
{
    char *data = malloc(len);

    CHECK(data != NULL);
    CHECK_EQ(pread(d->beside, data, len, (off_t)(sector * SECTOR)), (ssize_t)len);
    bool same = all_bytes_are(data, byte, len);
    free(data);
    return same;
}

#endif
