/*
 * The driver's side of a block queue: what a guest's virtio-blk driver does, without the guest.
 *
 * It measures a server, so it has to cost little itself.  Each request owns a slot whose
 * descriptors never move: three in the ring (header, data, status), or one that points to an
 * indirect table of three.  Per request it writes a header and one avail entry (or, where the ring
 * is packed, the descriptors once more); barriers, the
 * clock, and the decision to kick are paid once a batch.  A latency is therefore the time from
 * the batch that sent a request to the batch that saw it done.
 */
#include "cpu.h"
#include "driver_ring.h"
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define SECTOR (1u << VIRTIO_BLK_SECTOR_SHIFT)
#define PAGE 4096u

/* What a slot shares with the device: two cache lines of its own. */
struct request {
    struct virtio_blk_req_hdr header;
    uint8_t status;
    uint8_t unused[47];
    struct vring_desc table[4]; /* three are used */
};

struct slot {
    uint64_t block;
    uint64_t sent_ns;
    bool busy;
    bool write;
};

struct driver {
    const struct vhost_load_config *config;
    struct vhost_load_result *result;
    struct driver_ring ring;
    struct request *request;
    char *data;
    uint64_t data_addr;
    struct slot *slot;
    uint16_t *idle; /* stack of slots */
    uint32_t idle_count;
    uint16_t stride; /* descriptors a slot */
    uint64_t blocks;
    uint64_t sent;
    uint64_t next_block;
    uint64_t random;
    /* With VERIFY, a block: what was last written (0 = not by us), and whether it is in flight. */
    uint32_t *generation;
    bool *block_busy;
    uint32_t last_generation;
};

/* splitmix64: equal seeds give equal runs. */
static inline uint64_t next_random(struct driver *d)
{
    uint64_t z = d->random += 0x9e3779b97f4a7c15u;

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

__extension__ typedef unsigned __int128 wide;

static inline uint64_t below(uint64_t random, uint64_t limit)
{
    return (uint64_t)(((wide)random * limit) >> 64);
}

/* ---- stamps: each sector tells its own number and which write put it there ---- */

static uint64_t stamp_word(uint64_t sector, uint64_t generation, unsigned i)
{
    return (sector * 0x9e3779b97f4a7c15u) ^ (generation * 0xbf58476d1ce4e5b9u) ^
           (i * 0x94d049bb133111ebu);
}

static void stamp(char *data, uint64_t sector, uint64_t generation, uint32_t sectors)
{
    for (uint32_t s = 0; s < sectors; s++) {
        uint64_t *word = (uint64_t *)(data + (size_t)s * SECTOR);
        word[0] = generation;
        for (unsigned i = 1; i < SECTOR / 8; i++)
            word[i] = stamp_word(sector + s, generation, i);
    }
}

static bool sector_is_zero(const uint64_t *word)
{
    for (unsigned i = 0; i < SECTOR / 8; i++) {
        if (word[i])
            return false;
    }
    return true;
}

/* A block that this run has not written may hold zeroes or the stamps of an earlier run. */
static uint32_t stamp_errors(const char *data, uint64_t sector, uint64_t generation,
                             uint32_t sectors)
{
    uint32_t errors = 0;

    for (uint32_t s = 0; s < sectors; s++) {
        const uint64_t *word = (const uint64_t *)(data + (size_t)s * SECTOR);
        if (!generation && sector_is_zero(word))
            continue;
        bool wrong = generation && word[0] != generation;
        for (unsigned i = 1; i < SECTOR / 8 && !wrong; i++)
            wrong = word[i] != stamp_word(sector + s, word[0], i);
        errors += wrong;
    }
    return errors;
}

/* ---- the slots ---- */

static void slot_layout(struct driver *d, uint32_t i, uint64_t request_addr)
{
    const struct vhost_load_config *c = d->config;
    bool indirect = c->flags & VHOST_LOAD_INDIRECT;
    uint64_t addr = request_addr + i * sizeof(struct request);
    struct vring_desc *desc = indirect ? d->request[i].table : &d->ring.desc[3 * i];
    uint16_t first = indirect ? 0 : (uint16_t)(3 * i);

    desc[0] = (struct vring_desc){.addr = addr + offsetof(struct request, header),
                                  .len = sizeof(struct virtio_blk_req_hdr),
                                  .flags = VRING_DESC_F_NEXT,
                                  .next = (uint16_t)(first + 1)};
    desc[1] = (struct vring_desc){.addr = d->data_addr + (uint64_t)i * c->block_size,
                                  .len = c->block_size,
                                  .flags = VRING_DESC_F_NEXT | VRING_DESC_F_WRITE,
                                  .next = (uint16_t)(first + 2)};
    desc[2] = (struct vring_desc){
        .addr = addr + offsetof(struct request, status), .len = 1, .flags = VRING_DESC_F_WRITE};
    /* In a packed ring's tables the flags stand where split rings have the next entry. */
    for (int k = 0; indirect && d->ring.slot && k < 3; k++)
        desc[k].next = desc[k].flags;
    if (indirect) {
        d->ring.desc[i] = (struct vring_desc){.addr = addr + offsetof(struct request, table),
                                              .len = 3 * sizeof(struct vring_desc),
                                              .flags = VRING_DESC_F_INDIRECT};
    }
}

static int driver_open(struct driver *d)
{
    const struct vhost_load_config *c = d->config;
    struct driver_memory memory = {c->memory, c->memory_size, c->guest_addr};
    uint64_t requests_size =
        ((uint64_t)c->depth * sizeof(struct request) + PAGE - 1) & ~(PAGE - 1ull);

    d->stride = c->flags & VHOST_LOAD_INDIRECT ? 1 : 3;
    if (c->depth == 0 || (uint64_t)c->depth * d->stride > c->queue_size || c->block_size == 0 ||
        c->block_size % SECTOR || c->start % SECTOR || c->span < c->block_size ||
        c->write_percent > 100 || (!c->requests && !c->duration_ns) ||
        (c->call_fd < 0 && !(c->flags & VHOST_LOAD_POLL)) || c->buffers % PAGE)
        return -EINVAL;
    unsigned kind = (c->flags & VHOST_LOAD_PACKED ? DRIVER_RING_PACKED : 0) |
                    (c->flags & VHOST_LOAD_IN_ORDER ? DRIVER_RING_IN_ORDER : 0);
    int err = driver_ring_open(&d->ring, &memory, c->desc, c->avail, c->used, c->queue_size,
                               d->stride, kind);
    if (err)
        return err;
    d->ring.event_idx = c->flags & VHOST_LOAD_EVENT_IDX;
    d->ring.kick_fd = c->kick_fd;
    d->ring.call_fd = c->call_fd;
    d->blocks = c->span / c->block_size;
    d->request = (struct request *)driver_memory_at(&memory, c->buffers, requests_size);
    d->data_addr = c->buffers + requests_size;
    d->data = driver_memory_at(&memory, d->data_addr, (uint64_t)c->depth * c->block_size);
    if (!d->request || !d->data)
        return -EINVAL;

    d->random = c->seed;
    d->slot = calloc(c->depth, sizeof(*d->slot));
    d->idle = calloc(c->depth, sizeof(*d->idle));
    if (!d->slot || !d->idle)
        return -ENOMEM;
    if (c->flags & VHOST_LOAD_VERIFY) {
        if (d->blocks < c->depth)
            return -EINVAL;
        d->generation = calloc(d->blocks, sizeof(*d->generation));
        d->block_busy = calloc(d->blocks, sizeof(*d->block_busy));
        if (!d->generation || !d->block_busy)
            return -ENOMEM;
    }
    for (uint32_t i = 0; i < c->depth; i++) {
        slot_layout(d, i, c->buffers);
        d->idle[d->idle_count++] = (uint16_t)(c->depth - 1 - i);
    }
    return 0;
}

static void driver_close(struct driver *d)
{
    driver_ring_close(&d->ring);
    free(d->slot);
    free(d->idle);
    free(d->generation);
    free(d->block_busy);
}

static uint64_t choose_block(struct driver *d)
{
    uint64_t block;

    if (d->config->flags & VHOST_LOAD_RANDOM) {
        block = below(next_random(d), d->blocks);
    } else {
        block = d->next_block;
        d->next_block = block + 1 == d->blocks ? 0 : block + 1;
    }
    /* Two requests on one block in flight have no order, so no stamp could be expected of it. */
    if (d->block_busy) {
        while (d->block_busy[block])
            block = block + 1 == d->blocks ? 0 : block + 1;
        d->block_busy[block] = true;
    }
    return block;
}

static inline uint64_t first_sector(const struct driver *d, uint64_t block)
{
    return d->config->start / SECTOR + block * (d->config->block_size / SECTOR);
}

static void prepare_data(struct driver *d, const struct slot *s, char *data)
{
    uint32_t size = d->config->block_size;

    if (s->write)
        stamp(data, first_sector(d, s->block), ++d->last_generation, size / SECTOR);
    else
        memset(data, 0xa5, size); /* a read that writes nothing is then noticed */
}

static inline void send(struct driver *d, uint64_t now)
{
    const struct vhost_load_config *c = d->config;
    uint16_t i = d->idle[--d->idle_count];
    struct slot *s = &d->slot[i];
    struct request *r = &d->request[i];

    s->block = choose_block(d);
    s->write = c->write_percent && below(next_random(d), 100) < c->write_percent;
    s->sent_ns = now;
    s->busy = true;
    r->header.type = s->write ? VIRTIO_BLK_T_OUT : VIRTIO_BLK_T_IN;
    r->header.sector = first_sector(d, s->block);
    r->status = 0xff;
    if (c->write_percent) {
        bool indirect = c->flags & VHOST_LOAD_INDIRECT;
        struct vring_desc *data = indirect ? &r->table[1] : &d->ring.desc[3 * i + 1];
        uint16_t *flags = indirect && d->ring.slot ? &data->next : &data->flags;
        *flags = VRING_DESC_F_NEXT | (s->write ? 0 : VRING_DESC_F_WRITE);
    }
    if (unlikely(d->block_busy != NULL))
        prepare_data(d, s, d->data + (size_t)i * c->block_size);
    driver_ring_offer(&d->ring, (uint16_t)(i * d->stride));
    d->sent++;
}

static void check(struct driver *d, struct slot *s, uint16_t i)
{
    uint32_t sectors = d->config->block_size / SECTOR;
    const char *data = d->data + (size_t)i * d->config->block_size;

    d->block_busy[s->block] = false;
    if (d->request[i].status != VIRTIO_BLK_S_OK)
        d->generation[s->block] = 0;
    else if (s->write)
        d->generation[s->block] = (uint32_t)*(const uint64_t *)data;
    else
        d->result->corrupt +=
            stamp_errors(data, first_sector(d, s->block), d->generation[s->block], sectors);
}

/* Takes what is on the used ring. */
static int reap(struct driver *d, uint64_t now)
{
    const struct vhost_load_config *c = d->config;
    struct vhost_load_result *r = d->result;

    for (uint16_t n = driver_ring_pending(&d->ring); n; n--) {
        uint32_t id = driver_ring_elem(&d->ring, d->ring.used_idx).id;
        driver_ring_next(&d->ring);
        uint32_t i = d->stride == 1 ? id : id / 3;
        if (i >= c->depth || i * d->stride != id || !d->slot[i].busy)
            return -EPROTO;
        struct slot *s = &d->slot[i];
        s->busy = false;
        d->idle[d->idle_count++] = (uint16_t)i;
        r->requests++;
        r->latency[histogram_bucket(now - s->sent_ns)]++;
        if (likely(d->request[i].status == VIRTIO_BLK_S_OK))
            r->bytes += c->block_size;
        else
            r->errors++;
        if (unlikely(d->block_busy != NULL))
            check(d, s, (uint16_t)i);
    }
    return 0;
}

/* Spins until something is used. */
static int wait_spinning(struct driver *d)
{
    uint64_t limit = 0;

    for (uint32_t spins = 0; !driver_ring_pending(&d->ring); spins++) {
        cpu_relax();
        if (spins % 65536 != 65535 || !d->config->stall_ms)
            continue;
        if (!limit)
            limit = now_ns() + d->config->stall_ms * 1000000ull;
        else if (now_ns() > limit)
            return -ETIMEDOUT;
    }
    return 0;
}

/* Asks to be called, and sleeps until something is used. */
static int wait_sleeping(struct driver *d)
{
    struct pollfd p = {.fd = d->config->call_fd, .events = POLLIN};
    int timeout = d->config->stall_ms ? (int)d->config->stall_ms : -1;
    eventfd_t ignored;

    driver_ring_arm(&d->ring, d->ring.used_idx);
    /* The wish must be visible before the used index is looked at for the last time. */
    atomic_thread_fence(memory_order_seq_cst);
    while (!driver_ring_pending(&d->ring)) {
        d->result->sleeps++;
        int n = poll(&p, 1, timeout);
        if (n == 0)
            return -ETIMEDOUT;
        if (n > 0)
            eventfd_read(d->config->call_fd, &ignored);
    }
    return 0;
}

static int drive(struct driver *d, uint64_t start)
{
    const struct vhost_load_config *c = d->config;
    bool spin = c->flags & VHOST_LOAD_POLL;
    uint64_t wanted = c->requests ? c->requests : UINT64_MAX;
    uint64_t end = c->duration_ns ? start + c->duration_ns : UINT64_MAX;
    uint64_t now = start;
    int err = 0;

    while (!err) {
        if (now < end) {
            while (d->idle_count && d->sent < wanted)
                send(d, now);
        }
        if (d->ring.avail_idx != d->ring.published)
            driver_ring_publish(&d->ring);
        if (d->idle_count == c->depth)
            break;
        if (spin)
            driver_ring_disarm(&d->ring);
        err = spin ? wait_spinning(d) : wait_sleeping(d);
        now = now_ns();
        if (!err)
            err = reap(d, now);
    }
    d->result->kicks = d->ring.kicks;
    d->result->elapsed_ns = now - start;
    return err;
}

int vhost_driver_run(const struct vhost_load_config *config, struct vhost_load_result *result)
{
    struct driver d = {.config = config, .result = result};
    cpu_set_t before;

    *result = (struct vhost_load_result){0};
    int err = driver_open(&d);
    if (!err && config->cpu >= 0)
        err = sched_getaffinity(0, sizeof(before), &before) < 0 ? -errno : cpu_pin(config->cpu);
    if (!err) {
        uint64_t cpu = cpu_time_ns();
        err = drive(&d, now_ns());
        result->cpu_ns = cpu_time_ns() - cpu;
        if (config->cpu >= 0)
            sched_setaffinity(0, sizeof(before), &before);
    }
    driver_close(&d);
    return err;
}
