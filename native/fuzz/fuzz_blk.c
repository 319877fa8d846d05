/*
 * Block requests of any form, to an image that no request may make larger, and whose end nobody
 * may read or write past.
 */
#include "guest.h"

enum { IMAGE = 1 << 16, WRITE_THROUGH = 1, READ_ONLY = 2, NULL_IMAGE = 4, KINDS = 8 };

static struct guest guest;
static int image;

static struct vhost_device *device(uint8_t kind)
{
    static struct vhost_device *made[KINDS];
    struct vhost_blk_config config = {
        .fd = kind & NULL_IMAGE ? -1 : image,
        .flags = (kind & READ_ONLY ? VHOST_BLK_READ_ONLY : 0u) |
                 (kind & NULL_IMAGE ? VHOST_BLK_NULL : 0u),
        .capacity = IMAGE / 512,
        .num_queues = 1,
        .seg_max = 126,
        .max_discard_seg = 64,
        .max_discard_sectors = IMAGE / 512,
        .id = "fuzz",
    };

    if (!made[kind]) {
        CHECK_EQ(vhost_blk_new(&config, &made[kind]), 0);
        vhost_blk_set_writeback(made[kind], !(kind & WRITE_THROUGH));
    }
    return made[kind];
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    struct setup setup;

    if (!image) {
        guest_open(&guest);
        image = memfd_create("image", MFD_CLOEXEC);
        CHECK(image > 0);
        CHECK_EQ(ftruncate(image, IMAGE), 0);
    }
    if (!guest_take(&data, &len, &setup))
        return 0;
    guest.device = device(setup.device % KINDS);
    guest_run(&guest, &setup, data, len, 0, NULL);
    CHECK_EQ(lseek(image, 0, SEEK_END), IMAGE);
    return 0;
}
