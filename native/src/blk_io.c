/*
 * Where a block request meets the image.
 *
 * Three ways, tried in this order:
 *   at once    null images; data that surely needs no disk: any file on tmpfs, and reads that
 *              the page cache can serve (preadv2 with RWF_NOWAIT: Linux says EAGAIN otherwise)
 *   io_uring   everything else that moves data or flushes, submitted once a pass
 *   a worker   ranges, unaligned buffers under O_DIRECT, and hosts that refuse io_uring
 *
 * In none of them is data copied by us: iovecs point into guest memory.
 */
#include "blk.h"
#include <errno.h>
#include <liburing.h>
#include <limits.h>
#include <string.h>

enum {
    INLINE_MAX = 256 * 1024, /* longer copies would hold up the other queues */
    SUBMIT_MAX = 4 << 20,    /* and the kernel's from the page cache at submission would, too */
    PENALTY_MAX = 256,
};

bool blk_io_aligned(const struct blk *blk, const struct blk_request *r)
{
    uintptr_t bits = 0;

    for (uint32_t i = 0; i < r->iov_count; i++)
        bits |= (uintptr_t)r->iov[i].iov_base | r->iov[i].iov_len;
    return (bits & (blk->dma_align - 1)) == 0;
}

void blk_io_null(struct blk_request *r)
{
    for (uint32_t i = 0; r->type == VIRTIO_BLK_T_IN && i < r->iov_count; i++)
        memset(r->iov[i].iov_base, 0, r->iov[i].iov_len);
}

/* True: *result holds the outcome.  False: it would have waited, nothing has happened. */
static bool try_at_once(struct blk *blk, struct blk_request *r, int32_t *result)
{
    struct blk_queue *bq = r->queue->state;
    bool write = r->type == VIRTIO_BLK_T_OUT;
    ssize_t n;

    if (r->len - r->done > INLINE_MAX || r->iov_count > IOV_MAX)
        return false;
    off_t offset = (off_t)(r->offset + r->done);
    if (blk->memory_backed) {
        n = write ? pwritev(blk->fd, r->iov, (int)r->iov_count, offset)
                  : preadv(blk->fd, r->iov, (int)r->iov_count, offset);
    } else {
        if (write || blk->direct)
            return false;
        /* A cold disk is not asked each time: after a miss, ever more attempts are left out. */
        if (bq->nowait_skip) {
            bq->nowait_skip--;
            return false;
        }
        n = preadv2(blk->fd, r->iov, (int)r->iov_count, offset, RWF_NOWAIT);
        if (n < 0 && (errno == EAGAIN || errno == EOPNOTSUPP)) {
            if (bq->nowait_penalty < PENALTY_MAX)
                bq->nowait_penalty = bq->nowait_penalty ? 2 * bq->nowait_penalty : 1;
            bq->nowait_skip = bq->nowait_penalty;
            return false;
        }
        bq->nowait_penalty = 0;
    }
    /* A part means that the rest would wait or that the file ends: the engines find out. */
    if (n >= 0 && (uint32_t)n < r->len - r->done)
        return false;
    *result = n < 0 ? -errno : 0;
    count(r->queue, VHOST_COUNTER_INLINE, 1);
    return true;
}

static bool submit_uring(struct blk *blk, struct blk_request *r, struct io_uring *ring)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

    if (unlikely(!sqe)) {
        io_uring_submit(ring);
        sqe = io_uring_get_sqe(ring);
        if (!sqe)
            return false;
    }
    uint64_t offset = r->offset + r->done;
    if (r->type == VIRTIO_BLK_T_IN) {
        io_uring_prep_readv(sqe, blk->fd, r->iov, r->iov_count, offset);
    } else if (r->type == VIRTIO_BLK_T_OUT) {
        io_uring_prep_writev(sqe, blk->fd, r->iov, r->iov_count, offset);
        if (!atomic_load_explicit(&blk->writeback, memory_order_relaxed))
            sqe->rw_flags = RWF_DSYNC;
    } else {
        io_uring_prep_fsync(sqe, blk->fd, IORING_FSYNC_DATASYNC);
    }
    if (unlikely(r->len - r->done > SUBMIT_MAX) && !blk->direct)
        sqe->flags |= IOSQE_ASYNC;
    io_uring_sqe_set_data(sqe, &r->op);
    return true;
}

static void ignore(struct io_op *op, int32_t result)
{
    (void)op;
    (void)result;
}

void blk_io_recall(struct vhost_queue *q)
{
    static struct io_op unheard = {.done = ignore};
    struct io_uring *ring = iothread_uring(q->thread);
    struct blk_queue *bq = q->state;

    for (uint32_t i = 0; ring && i < q->ring.size; i++) {
        if (!queue_holds(q, i))
            continue;
        struct io_uring_sqe *sqe = io_uring_get_sqe(ring);
        if (!sqe) {
            io_uring_submit(ring);
            sqe = io_uring_get_sqe(ring);
        }
        if (!sqe)
            break;
        io_uring_prep_cancel(sqe, &bq->request[i].op, 0);
        io_uring_sqe_set_data(sqe, &unheard);
    }
    /* Now: a request that is made later may have the address of one that ends meanwhile. */
    if (ring)
        io_uring_submit(ring);
}

enum blk_outcome blk_io_start(struct blk *blk, struct blk_request *r, int32_t *result)
{
    bool data = r->type == VIRTIO_BLK_T_IN || r->type == VIRTIO_BLK_T_OUT;

    if (blk->flags & VHOST_BLK_NULL) {
        if (unlikely(data && r->len > INLINE_MAX)) {
            blk_worker_submit(blk->pool, r);
            return BLK_SUBMITTED;
        }
        if (data)
            blk_io_null(r);
        *result = 0;
        return BLK_EXECUTED;
    }
    if (data && try_at_once(blk, r, result))
        return BLK_EXECUTED;
    struct io_uring *ring = iothread_uring(r->queue->thread);
    bool ranges = r->type == VIRTIO_BLK_T_DISCARD || r->type == VIRTIO_BLK_T_WRITE_ZEROES;
    bool bounce = data && blk->direct && !blk_io_aligned(blk, r);
    if (!ring || (blk->flags & VHOST_BLK_THREADS) || ranges || bounce ||
        !submit_uring(blk, r, ring))
        blk_worker_submit(blk->pool, r);
    return BLK_SUBMITTED;
}
