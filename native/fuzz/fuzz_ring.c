/*
 * Any ring, served by a device that looks at all that it is given: every buffer must lie in the
 * guest's memory, and where the IOMMU allows it, if there is one; and what is popped is pushed, the
 * last first if the input says so.
 */
#include "guest.h"

enum { BACKWARDS = 1, LOOK_FIRST = 2 };

static struct guest guest;
static volatile unsigned sum;

static void touch(struct vhost_queue *q, const struct chain *c)
{
    uint32_t hint = 0;

    for (uint32_t i = 0; i < c->readable + c->writable; i++) {
        const char *base = c->iov[i].iov_base;
        size_t len = c->iov[i].iov_len, inside = 0;
        for (uint32_t r = 0; r < guest.memory->count; r++) {
            const struct vhost_region *region = guest.memory->region[r];
            inside |= base >= region->host && len <= region->size &&
                      (size_t)(base - region->host) <= region->size - len;
        }
        CHECK(inside);
        uint64_t addr = memory_guest_addr(q->memory, base, &hint);
        CHECK_EQ(addr < MEMORY, 1);
        unsigned access = i < c->readable ? VHOST_ACCESS_READ : VHOST_ACCESS_WRITE;
        CHECK(!(guest.setup.flags & FLAG_VIEW) || iotlb_allows(&guest.iotlb, addr, len, access));
        if (i < c->readable)
            sum += (unsigned char)base[0] + (unsigned char)base[len - 1];
        else
            memset(c->iov[i].iov_base, 0x5a, len);
    }
    if (q->log && c->writable)
        log_written(q, &c->iov[c->readable], c->writable, c->writable_len);
}

static bool service(struct vhost_queue *q)
{
    struct chain popped[RING_MAX], c;
    uint32_t pending = ring_pending(q), n = 0;

    if (pending && guest.setup.device & LOOK_FIRST) {
        if (!ring_pop(q, &c))
            return true;
        ring_unpop(q, c.head);
    }
    while (n < pending && ring_pop(q, &popped[n]))
        touch(q, &popped[n++]);
    for (uint32_t i = 0; i < n; i++) {
        const struct chain *done = &popped[guest.setup.device & BACKWARDS ? n - 1 - i : i];
        ring_push(q, done->head, (uint32_t)done->writable_len);
    }
    return n > 0;
}

static int queue_open(struct vhost_queue *q)
{
    (void)q;
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t len)
{
    static const struct device_ops ops = {
        .queue_open = queue_open, .service = service, .chain_max = RING_MAX};
    static struct vhost_device device;
    struct setup setup;

    if (!guest.device) {
        guest_open(&guest);
        CHECK_EQ(device_init(&device, &ops, 1), 0);
        guest.device = &device;
    }
    if (guest_take(&data, &len, &setup))
        guest_run(&guest, &setup, data, len, 0, NULL);
    return 0;
}
