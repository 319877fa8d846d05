/*
 * Any in-flight region beside any ring: a queue goes on from what both say, or is refused.
 *
 * After the setup stands the queue's part of the region, then the guest's memory.  A region that is
 * refused is left as it was; where all that it had in flight was popped, it says so.
 */
#include "guest.h"

enum { BACKWARDS = 1, FRESH = 2 };

static struct guest guest;
static char *shared;

static bool service(struct vhost_queue *q)
{
    struct chain popped[RING_MAX], c;
    uint32_t pending = ring_pending(q), n = 0;

    while (n < pending && n < RING_MAX && ring_pop(q, &c))
        popped[n++] = c;
    for (uint32_t i = 0; i < n; i++) {
        const struct chain *done = &popped[guest.setup.device & BACKWARDS ? n - 1 - i : i];
        ring_push(q, done->head, (uint32_t)done->writable_len);
        if (i == n / 2)
            ring_show(q);
    }
    return n > 0;
}

static int queue_open(struct vhost_queue *q)
{
    (void)q;
    return 0;
}

/* Where the region is at rest: no flag is set. */
static void expect_idle(uint32_t size, bool packed)
{
    size_t head = packed ? sizeof(struct vhost_user_inflight_packed)
                         : sizeof(struct vhost_user_inflight_split);
    size_t entry =
        packed ? sizeof(struct vhost_user_inflight_desc) : sizeof(struct vhost_user_inflight_chain);

    for (uint32_t i = 0; i < size; i++)
        CHECK_EQ(shared[head + i * entry], 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static const struct device_ops ops = {
        .queue_open = queue_open, .service = service, .tracked = true, .chain_max = RING_MAX};
    static struct vhost_device device;
    static int fd;
    static char before[RING_MAX * 64];
    struct setup setup;

    if (!guest.device) {
        guest_open(&guest);
        CHECK_EQ(device_init(&device, &ops, 1), 0);
        guest.device = &device;
        fd = memfd_create("inflight", MFD_CLOEXEC);
        CHECK_EQ(ftruncate(fd, sizeof(before)), 0);
        shared = mmap(NULL, sizeof(before), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        CHECK(shared != MAP_FAILED);
    }
    if (!guest_take(&data, &len, &setup))
        return 0;
    bool packed = setup.flags & FLAG_PACKED;
    uint32_t size = packed ? 1u + setup.size % RING_MAX : 1u << setup.size % 8;
    size_t part = vhost_inflight_size(1, size, packed);
    CHECK(part <= sizeof(before));
    memset(shared, 0, sizeof(before));
    if (!(setup.device & FRESH)) {
        size_t given = len < part ? len : part;
        memcpy(shared, data, given);
        data += given;
        len -= given;
    }
    memcpy(before, shared, sizeof(before));
    CHECK_EQ(vhost_inflight_map(fd, 0, 1, size, packed, &guest.inflight), 0);
    bool served = guest_run(&guest, &setup, data, len, 0, NULL);
    vhost_inflight_unref(guest.inflight);
    if (served && guest.idle)
        expect_idle(size, packed);
    else if (!served)
        CHECK_EQ(memcmp(before, shared, sizeof(before)), 0);
    return 0;
}
