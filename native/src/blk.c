/*
 * virtio-blk (virtio 1.3, section 5.2).
 *
 * A chain is taken apart once: the header is copied out of the readable buffers, however many
 * descriptors it is spread over; the last byte of the writable ones is the status; what lies
 * between is data.  The result is a checked struct blk_request, and only that reaches an engine.
 * A request that fails a check gets its status here; one without a place for a status is
 * returned with length 0.
 */
#include "blk.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/stat.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

enum {
    SECTOR = 1 << VIRTIO_BLK_SECTOR_SHIFT,
    PASS_MAX = 128,  /* requests a pass: fairness between the queues of an iothread */
    SHOW_EVERY = 4,  /* requests done at once until a polling driver sees the used index move */
    SHOW_LOGGED = 8, /* the same where pages are logged: each time is a full barrier */
    TMPFS_SUPER_MAGIC = 0x01021994,
};

/* ---- buffers ---- */

/* Moves `len` bytes off the front of the buffers to `to`. */
static void take_front(struct iovec **iov, uint32_t *n, void *to, size_t len)
{
    while (len) {
        size_t part = (*iov)->iov_len < len ? (*iov)->iov_len : len;
        memcpy(to, (*iov)->iov_base, part);
        to = (char *)to + part;
        len -= part;
        (*iov)->iov_base = (char *)(*iov)->iov_base + part;
        (*iov)->iov_len -= part;
        if ((*iov)->iov_len == 0) {
            (*iov)++;
            (*n)--;
        }
    }
}

/* Copies `len` bytes into the buffers, which are long enough. */
static void copy_to(const struct iovec *iov, const void *from, size_t len)
{
    for (; len; iov++) {
        size_t part = iov->iov_len < len ? iov->iov_len : len;
        memcpy(iov->iov_base, from, part);
        from = (const char *)from + part;
        len -= part;
    }
}

/* The header, which nearly every driver puts into a descriptor of its own. */
static inline void take_header(struct iovec **iov, uint32_t *n, struct virtio_blk_req_hdr *hdr)
{
    if (likely((*iov)->iov_len == sizeof(*hdr))) {
        memcpy(hdr, (*iov)->iov_base, sizeof(*hdr));
        (*iov)++;
        (*n)--;
    } else {
        take_front(iov, n, hdr, sizeof(*hdr));
    }
}

static int keep_iov(struct blk_request *r, const struct iovec *iov, uint32_t n)
{
    if (likely(n == 1)) {
        r->iov[0] = iov[0];
        r->iov_count = 1;
        return 0;
    }
    if (n > r->iov_room) {
        struct iovec *more = malloc(n * sizeof(*more));
        if (!more)
            return -ENOMEM;
        if (r->iov != r->inline_iov)
            free(r->iov);
        r->iov = more;
        r->iov_room = n;
    }
    memcpy(r->iov, iov, n * sizeof(*iov));
    r->iov_count = n;
    return 0;
}

/* ---- completion ---- */

/* The data, also of a read that failed in the middle, and the status.  Out of line: few queues have
 * a log. */
static __attribute__((noinline)) void log_request(struct vhost_queue *q,
                                                  const struct blk_request *r)
{
    if (r->type == VIRTIO_BLK_T_IN && r->len)
        log_written(q, r->iov, r->iov_count, r->len);
    log_mark(q, memory_guest_addr(q->memory, r->status, &q->log_hint), 1);
}

void blk_request_finish(struct blk_request *r, int32_t result, uint64_t now)
{
    struct vhost_queue *q = r->queue;

    if (likely(result == 0)) {
        *r->status = VIRTIO_BLK_S_OK;
    } else {
        bool unsupported = result == -ENOTSUP;
        *r->status = unsupported ? VIRTIO_BLK_S_UNSUPP : VIRTIO_BLK_S_IOERR;
        count(q, unsupported ? VHOST_COUNTER_UNSUPPORTED : VHOST_COUNTER_ERRORS, 1);
        r->used_len = 1;
    }
    if (unlikely(q->log))
        log_request(q, r);
    if (unlikely(r->ranges != NULL)) {
        free(r->ranges);
        r->ranges = NULL;
    }
    count(q, VHOST_COUNTER_COMPLETIONS, 1);
    count_latency(q, now - r->start_ns);
    ring_push(q, r->head, r->used_len);
}

/* What was called back, or stopped in the middle, is the next server's to do. */
static bool is_left(struct blk_request *r, int32_t result)
{
    struct vhost_queue *q = r->queue;

    if (!q->leaving || (result != -ECANCELED && result != -EINTR))
        return false;
    free(r->ranges);
    r->ranges = NULL;
    q->in_flight--;
    return true;
}

static void on_done(struct io_op *op, int32_t result)
{
    struct blk_request *r = container_of(op, struct blk_request, op);
    struct vhost_queue *q = r->queue;

    if (unlikely(result > 0 || (result == 0 && r->done < r->len))) {
        /* A transfer: the rest of a short one is asked for again; its end means end of file. */
        struct blk *blk = blk_of(q);
        uint32_t part = (uint32_t)result;
        int32_t at_once;
        if (part == 0 || part > r->len - r->done) {
            result = -EIO;
        } else {
            r->done += part;
            result = 0;
            if (r->done < r->len) {
                if (unlikely(q->log) && r->type == VIRTIO_BLK_T_IN)
                    log_written(q, r->iov, r->iov_count, part);
                for (; part >= r->iov->iov_len; r->iov_count--) {
                    part -= (uint32_t)r->iov->iov_len;
                    memmove(r->iov, r->iov + 1, (r->iov_count - 1) * sizeof(*r->iov));
                }
                r->iov->iov_base = (char *)r->iov->iov_base + part;
                r->iov->iov_len -= part;
                if (blk_io_start(blk, r, &at_once) == BLK_SUBMITTED)
                    return;
                result = at_once;
            }
        }
    } else if (unlikely(result < 0) && is_left(r, result)) {
        return;
    }
    blk_request_finish(r, result, iothread_now(q->thread));
    iothread_schedule(q);
}

/* ---- parsing ---- */

static bool range_ok(const struct blk *blk, uint64_t sector, uint64_t sectors)
{
    uint64_t capacity = atomic_load_explicit(&blk->capacity, memory_order_relaxed);

    return sector <= capacity && sectors <= capacity - sector;
}

/* IN and OUT (section 5.2.6.2): whole sectors, inside the disk, data on the right side only. */
static int parse_transfer(struct blk *blk, struct blk_request *r, uint64_t sector, bool write,
                          uint64_t readable, uint64_t writable)
{
    uint64_t len = write ? readable : writable;

    if ((write ? writable : readable) != 0 || len % SECTOR ||
        !range_ok(blk, sector, len >> VIRTIO_BLK_SECTOR_SHIFT))
        return -EIO;
    if (write && (blk->flags & VHOST_BLK_READ_ONLY))
        return -EROFS;
    r->offset = sector << VIRTIO_BLK_SECTOR_SHIFT;
    r->len = (uint32_t)len;
    r->used_len = write ? 1 : r->len + 1;
    count(r->queue, write ? VHOST_COUNTER_WRITES : VHOST_COUNTER_READS, 1);
    count(r->queue, write ? VHOST_COUNTER_BYTES_WRITTEN : VHOST_COUNTER_BYTES_READ, len);
    return 0;
}

/* DISCARD and WRITE_ZEROES: an array of ranges, which may lie over several descriptors. */
static int parse_ranges(struct blk *blk, struct blk_request *r, struct iovec *iov, uint32_t n,
                        uint64_t len)
{
    bool discard = r->type == VIRTIO_BLK_T_DISCARD;
    uint64_t count_of = len / sizeof(struct virtio_blk_range);

    if (!has_bit(r->queue->features, discard ? VIRTIO_BLK_F_DISCARD : VIRTIO_BLK_F_WRITE_ZEROES))
        return -ENOTSUP;
    if (blk->flags & VHOST_BLK_READ_ONLY)
        return -EROFS;
    if (count_of == 0 || len % sizeof(struct virtio_blk_range) || count_of > blk->max_discard_seg)
        return -EIO;
    r->ranges = malloc(len);
    if (!r->ranges)
        return -ENOMEM;
    take_front(&iov, &n, r->ranges, len);
    r->num_ranges = (uint16_t)count_of;
    for (uint32_t i = 0; i < count_of; i++) {
        struct virtio_blk_range *range = &r->ranges[i];
        /* Section 5.2.6.2: unknown flags, and unmap on a discard, are UNSUPP. */
        if (range->flags & ~(discard ? 0u : VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP))
            return -ENOTSUP;
        if (range->num_sectors == 0 || range->num_sectors > blk->max_discard_sectors ||
            !range_ok(blk, range->sector, range->num_sectors))
            return -EIO;
    }
    count(r->queue, discard ? VHOST_COUNTER_DISCARDS : VHOST_COUNTER_WRITE_ZEROES, 1);
    return 0;
}

static int parse_id(struct blk *blk, struct blk_request *r, const struct chain *c,
                    const struct iovec *iov, uint64_t writable)
{
    if (writable != VIRTIO_BLK_ID_BYTES || c->readable_len != sizeof(struct virtio_blk_req_hdr))
        return -EIO;
    copy_to(iov, blk->id, VIRTIO_BLK_ID_BYTES);
    if (unlikely(r->queue->log))
        log_written(r->queue, iov, c->writable, VIRTIO_BLK_ID_BYTES);
    r->used_len = VIRTIO_BLK_ID_BYTES + 1;
    return 0;
}

/*
 * Makes the chain a request.  1: an engine shall run it; 0 or a negative errno: it is finished
 * with that result; *r is NULL where there is no place for a status.
 */
static int parse(struct vhost_queue *q, const struct chain *c, struct blk_request **out)
{
    struct blk *blk = blk_of(q);
    struct blk_queue *bq = q->state;
    struct blk_request *r = &bq->request[c->head];
    struct virtio_blk_req_hdr hdr;
    int err;

    *out = NULL;
    if (c->writable_len == 0)
        return -EIO;
    *out = r;
    r->head = c->head;
    r->done = r->len = 0;
    r->used_len = 1;
    struct iovec *last = &c->iov[c->readable + c->writable - 1];
    r->status = (uint8_t *)last->iov_base + --last->iov_len;
    if (c->readable_len < sizeof(hdr))
        return -EIO;

    struct iovec *in = c->iov + c->readable, *data = c->iov;
    uint32_t in_count = c->writable - (last->iov_len == 0), data_count = c->readable;
    uint64_t readable = c->readable_len - sizeof(hdr), writable = c->writable_len - 1;
    take_header(&data, &data_count, &hdr);
    r->type = hdr.type;

    switch (hdr.type) {
    case VIRTIO_BLK_T_IN:
        err = parse_transfer(blk, r, hdr.sector, false, readable, writable);
        data = in;
        data_count = in_count;
        break;
    case VIRTIO_BLK_T_OUT:
        err = parse_transfer(blk, r, hdr.sector, true, readable, writable);
        break;
    case VIRTIO_BLK_T_FLUSH:
        count(q, VHOST_COUNTER_FLUSHES, 1);
        return blk->flags & (VHOST_BLK_NULL | VHOST_BLK_NO_FLUSH) ? 0 : 1;
    case VIRTIO_BLK_T_GET_ID:
        return parse_id(blk, r, c, in, writable);
    case VIRTIO_BLK_T_DISCARD:
    case VIRTIO_BLK_T_WRITE_ZEROES:
        err = parse_ranges(blk, r, data, data_count, readable);
        return err ? err : 1;
    default:
        return -ENOTSUP;
    }
    if (err < 0 || r->len == 0)
        return err;
    /* seg_max counts the driver's data segments, not our splits of them. */
    err = data_count > blk->seg_max + c->splits ? -EIO : keep_iov(r, data, data_count);
    if (unlikely(err < 0)) {
        r->len = 0;
        return err;
    }
    return 1;
}

/* ---- the queue ---- */

/* What was done at once, a few requests for one clock read. */
struct finished {
    uint32_t count;
    struct blk_request *request[SHOW_LOGGED];
    int32_t result[SHOW_LOGGED];
};

static void finish(struct vhost_queue *q, struct finished *f)
{
    uint64_t now = now_ns();

    for (uint32_t i = 0; i < f->count; i++)
        blk_request_finish(f->request[i], f->result[i], now);
    f->count = 0;
    ring_show(q);
}

static bool service(struct vhost_queue *q)
{
    struct blk *blk = blk_of(q);
    struct finished finished;
    uint32_t show_every = q->log ? SHOW_LOGGED : SHOW_EVERY;
    struct chain chain;
    struct blk_request *r;
    uint32_t n = 0;

    q->no_kicks = !q->enabled || !queue_may_pop(q);
    if (q->no_kicks)
        return false;
    uint32_t pending = ring_pending(q);
    if (pending == 0)
        return false;
    uint64_t now = now_ns();
    finished.count = 0;
    for (; n < pending && n < PASS_MAX && ring_pop(q, &chain); n++) {
        int32_t result = parse(q, &chain, &r);
        if (unlikely(!r)) {
            ring_push(q, chain.head, 0);
            count(q, VHOST_COUNTER_ERRORS, 1);
            continue;
        }
        r->start_ns = now;
        if (result == 1 && blk_io_start(blk, r, &result) == BLK_SUBMITTED)
            continue;
        finished.request[finished.count] = r;
        finished.result[finished.count] = result;
        if (++finished.count == show_every)
            finish(q, &finished);
    }
    if (finished.count)
        finish(q, &finished);
    count(q, VHOST_COUNTER_BATCHES, 1);
    count(q, VHOST_COUNTER_REQUESTS, n);
    return n > 0;
}

static int queue_open(struct vhost_queue *q)
{
    uint32_t size = q->ring.size;
    struct blk_queue *bq = calloc(1, sizeof(*bq) + size * sizeof(bq->request[0]));

    if (!bq)
        return -ENOMEM;
    for (uint32_t i = 0; i < size; i++) {
        struct blk_request *r = &bq->request[i];
        r->op.done = on_done;
        r->queue = q;
        r->iov = r->inline_iov;
        r->iov_room = BLK_INLINE_IOVS;
    }
    q->state = bq;
    return 0;
}

static void queue_close(struct vhost_queue *q)
{
    struct blk_queue *bq = q->state;

    for (uint32_t i = 0; i < q->ring.size; i++) {
        if (bq->request[i].iov != bq->request[i].inline_iov)
            free(bq->request[i].iov);
    }
    free(bq);
}

static void recall(struct vhost_queue *q)
{
    blk_worker_recall(blk_of(q)->pool, q);
    blk_io_recall(q);
}

/* ---- the device ---- */

static void blk_free(struct vhost_device *device)
{
    struct blk *blk = container_of(device, struct blk, device);

    blk_worker_pool_free(blk->pool);
    if (blk->fd >= 0)
        close(blk->fd);
    free(blk);
}

static const struct device_ops blk_ops = {
    .queue_open = queue_open,
    .queue_close = queue_close,
    .service = service,
    .recall = recall,
    .free = blk_free,
    .tracked = true,
    /* seg_max data segments, header and status: drivers with INDIRECT may exceed the ring. */
    .chain_max = 128,
};

static int probe_file(struct blk *blk, int fd)
{
    struct statfs fs;
    struct stat st;
    struct statx stx;

    blk->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    int flags = fcntl(blk->fd, F_GETFL);
    if (flags < 0 || fstatfs(blk->fd, &fs) < 0 || fstat(blk->fd, &st) < 0)
        return -errno;
    /* A device node lies on a tmpfs, too, but its data does not. */
    blk->memory_backed = fs.f_type == TMPFS_SUPER_MAGIC && S_ISREG(st.st_mode);
    blk->direct = flags & O_DIRECT;
    blk->dma_align = SECTOR;
    if (statx(blk->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &stx) == 0 &&
        (stx.stx_mask & STATX_DIOALIGN) && stx.stx_dio_mem_align)
        blk->dma_align = stx.stx_dio_mem_align;
    return 0;
}

int vhost_blk_new(const struct vhost_blk_config *config, struct vhost_device **out)
{
    if (config->num_queues == 0 || config->seg_max == 0)
        return -EINVAL;
    struct blk *blk = calloc(1, sizeof(*blk));
    if (!blk)
        return -ENOMEM;
    blk->fd = -1;
    blk->flags = config->flags;
    blk->seg_max = config->seg_max;
    blk->max_discard_seg = config->max_discard_seg;
    blk->max_discard_sectors = config->max_discard_sectors;
    memcpy(blk->id, config->id, sizeof(blk->id));
    atomic_init(&blk->capacity, config->capacity);
    atomic_init(&blk->writeback, true);
    int err = config->flags & VHOST_BLK_NULL ? 0 : probe_file(blk, config->fd);
    if (err == 0)
        err = blk_worker_pool_new(blk, &blk->pool);
    if (err == 0)
        err = device_init(&blk->device, &blk_ops, config->num_queues);
    if (err < 0) {
        blk_free(&blk->device);
        return err;
    }
    *out = &blk->device;
    return 0;
}

void vhost_blk_set_writeback(struct vhost_device *device, bool on)
{
    atomic_store(&container_of(device, struct blk, device)->writeback, on);
}

void vhost_blk_set_capacity(struct vhost_device *device, uint64_t sectors)
{
    atomic_store(&container_of(device, struct blk, device)->capacity, sectors);
}
