/*
 * Worker threads of a block device: for what io_uring cannot do (ranges of block devices, bounce
 * buffers) or may not (hosts that refuse it).  Threads start on demand and end with the device.
 * Workers know nothing of rings: they return a result to the iothread that owns the queue.
 */
#include "blk.h"
#include "libsandbox.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

enum { WORKERS_MAX = 8, ZERO_CHUNK = 1 << 20, BOUNCE_MAX = 1 << 20, BOUNCE_ALIGN = 4096 };

struct blk_worker_pool {
    struct blk *blk;
    pthread_mutex_t lock;
    pthread_cond_t work;
    struct io_op *head, **tail;
    uint32_t threads, idle;
    bool stop;
    pthread_t thread[WORKERS_MAX];
};

/* ---- transfers ---- */

static int32_t transfer(const struct blk *blk, bool write, const struct iovec *iov, uint32_t n,
                        uint64_t offset)
{
    int flags = write && !atomic_load(&blk->writeback) ? RWF_DSYNC : 0;
    int vectors = n < IOV_MAX ? (int)n : IOV_MAX;
    ssize_t done;

    do {
        done = write ? pwritev2(blk->fd, iov, vectors, (off_t)offset, flags)
                     : preadv2(blk->fd, iov, vectors, (off_t)offset, flags);
    } while (done < 0 && errno == EINTR);
    return done < 0 ? -errno : (int32_t)done;
}

static void copy(char *buffer, const struct iovec *iov, uint32_t n, size_t len, bool to_guest)
{
    for (uint32_t i = 0; i < n && len; i++) {
        size_t part = iov[i].iov_len < len ? iov[i].iov_len : len;
        if (to_guest) {
            memcpy(iov[i].iov_base, buffer, part);
        } else {
            memcpy(buffer, iov[i].iov_base, part);
        }
        buffer += part;
        len -= part;
    }
}

/* O_DIRECT wants aligned buffers; firmware and some drivers do not give them.  A part at a time,
 * as a short transfer: a request can be far larger than the guest memory that it names. */
static int32_t bounce(const struct blk *blk, struct blk_request *r, bool write)
{
    size_t left = r->len - r->done, len = left < BOUNCE_MAX ? left : BOUNCE_MAX;
    struct iovec iov = {.iov_base = aligned_alloc(BOUNCE_ALIGN, (len + BOUNCE_ALIGN - 1) &
                                                                    ~(size_t)(BOUNCE_ALIGN - 1)),
                        .iov_len = len};

    if (!iov.iov_base)
        return -ENOMEM;
    if (write)
        copy(iov.iov_base, r->iov, r->iov_count, len, false);
    int32_t result = transfer(blk, write, &iov, 1, r->offset + r->done);
    if (!write && result > 0)
        copy(iov.iov_base, r->iov, r->iov_count, (size_t)result, true);
    free(iov.iov_base);
    return result;
}

/* ---- ranges ---- */

static int write_zeroes_by_hand(int fd, off_t offset, off_t len)
{
    char *zeroes = aligned_alloc(BOUNCE_ALIGN, ZERO_CHUNK);
    int err = zeroes ? 0 : -ENOMEM;

    if (zeroes)
        memset(zeroes, 0, ZERO_CHUNK);
    while (err == 0 && len > 0) {
        ssize_t n = pwrite(fd, zeroes, len < ZERO_CHUNK ? (size_t)len : ZERO_CHUNK, offset);
        if (n < 0) {
            err = errno == EINTR ? 0 : -errno;
        } else {
            offset += n;
            len -= n;
        }
    }
    free(zeroes);
    return err;
}

int vhost_file_punch(int fd, uint64_t offset, uint64_t len)
{
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

    return fallocate(fd, mode, (off_t)offset, (off_t)len) < 0 ? -errno : 0;
}

static int device_range(int fd, unsigned long request, uint64_t offset, uint64_t len)
{
    uint64_t range[2] = {offset, len};

    return ioctl(fd, request, range) < 0 ? -errno : 0;
}

static int discard(const struct blk *blk, uint64_t offset, uint64_t len)
{
    int err = blk->flags & VHOST_BLK_BLOCK_DEVICE ? device_range(blk->fd, BLKDISCARD, offset, len)
                                                  : vhost_file_punch(blk->fd, offset, len);
    /* Only a hint (virtio 1.3, section 5.2.6.2): a file system without holes is no error. */
    return err == -EOPNOTSUPP || err == -ENOTTY ? 0 : err;
}

static int write_zeroes(const struct blk *blk, uint64_t offset, uint64_t len, bool unmap)
{
    int err = -EOPNOTSUPP;

    if (blk->flags & VHOST_BLK_BLOCK_DEVICE) {
        err = device_range(blk->fd, BLKZEROOUT, offset, len);
    } else if (unmap) {
        err = vhost_file_punch(blk->fd, offset, len);
    } else if (fallocate(blk->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)offset,
                         (off_t)len) == 0) {
        err = 0;
    }
    return err ? write_zeroes_by_hand(blk->fd, (off_t)offset, (off_t)len) : 0;
}

static int32_t run_ranges(const struct blk *blk, const struct blk_request *r)
{
    int err = 0;

    for (uint32_t i = 0; i < r->num_ranges && err == 0; i++) {
        const struct virtio_blk_range *range = &r->ranges[i];
        uint64_t offset = range->sector << VIRTIO_BLK_SECTOR_SHIFT;
        uint64_t len = (uint64_t)range->num_sectors << VIRTIO_BLK_SECTOR_SHIFT;
        if (r->type == VIRTIO_BLK_T_DISCARD) {
            err = discard(blk, offset, len);
        } else {
            err = write_zeroes(blk, offset, len, range->flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
        }
    }
    if (err == 0 && !atomic_load(&blk->writeback) && fdatasync(blk->fd) < 0)
        err = -errno;
    /* UNSUPP is for what was never negotiated; what the image refuses is an I/O error. */
    return err == -ENOTSUP ? -EIO : err;
}

static int32_t run(const struct blk *blk, struct blk_request *r)
{
    bool write = r->type == VIRTIO_BLK_T_OUT;

    switch (r->type) {
    case VIRTIO_BLK_T_IN:
    case VIRTIO_BLK_T_OUT:
        if (blk->flags & VHOST_BLK_NULL) {
            blk_io_null(r);
            r->done = r->len;
            return 0;
        }
        if (blk->direct && !blk_io_aligned(blk, r))
            return bounce(blk, r, write);
        return transfer(blk, write, r->iov, r->iov_count, r->offset + r->done);
    case VIRTIO_BLK_T_FLUSH:
        return fdatasync(blk->fd) < 0 ? -errno : 0;
    default:
        return run_ranges(blk, r);
    }
}

/* ---- threads ---- */

static void *worker(void *arg)
{
    struct blk_worker_pool *pool = arg;

    pthread_setname_np(pthread_self(), "vdev-blk");
    sandbox_enter(SANDBOX_IOTHREAD); /* it inherited the filter; now it can say so, too */
    pthread_mutex_lock(&pool->lock);
    for (;;) {
        while (!pool->head && !pool->stop) {
            pool->idle++;
            pthread_cond_wait(&pool->work, &pool->lock);
            pool->idle--;
        }
        if (!pool->head)
            break;
        struct io_op *op = pool->head;
        pool->head = op->next;
        if (!pool->head)
            pool->tail = &pool->head;
        pthread_mutex_unlock(&pool->lock);
        struct blk_request *r = container_of(op, struct blk_request, op);
        iothread_complete(r->queue->thread, op, run(pool->blk, r));
        pthread_mutex_lock(&pool->lock);
    }
    pthread_mutex_unlock(&pool->lock);
    return NULL;
}

static bool start_worker(struct blk_worker_pool *pool)
{
    sigset_t all, before;

    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    bool ok = pthread_create(&pool->thread[pool->threads], NULL, worker, pool) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pool->threads += ok;
    return ok;
}

void blk_worker_submit(struct blk_worker_pool *pool, struct blk_request *r)
{
    pthread_mutex_lock(&pool->lock);
    bool refused =
        pool->idle == 0 && pool->threads < WORKERS_MAX && !start_worker(pool) && pool->threads == 0;
    if (!refused) {
        r->op.next = NULL;
        *pool->tail = &r->op;
        pool->tail = &r->op.next;
        pthread_cond_signal(&pool->work);
    }
    pthread_mutex_unlock(&pool->lock);
    if (refused)
        iothread_complete(r->queue->thread, &r->op, -EAGAIN);
}

void blk_worker_recall(struct blk_worker_pool *pool, struct vhost_queue *q)
{
    struct io_op *recalled = NULL;

    pthread_mutex_lock(&pool->lock);
    for (struct io_op **p = &pool->head; *p;) {
        struct io_op *op = *p;
        if (container_of(op, struct blk_request, op)->queue != q) {
            p = &op->next;
            continue;
        }
        *p = op->next;
        if (pool->tail == &op->next)
            pool->tail = p;
        op->next = recalled;
        recalled = op;
    }
    pthread_mutex_unlock(&pool->lock);
    for (struct io_op *next; recalled; recalled = next) {
        next = recalled->next;
        recalled->done(recalled, -ECANCELED);
    }
}

int blk_worker_pool_new(struct blk *blk, struct blk_worker_pool **out)
{
    struct blk_worker_pool *pool = calloc(1, sizeof(*pool));

    if (!pool)
        return -ENOMEM;
    pool->blk = blk;
    pool->tail = &pool->head;
    pthread_mutex_init(&pool->lock, NULL);
    pthread_cond_init(&pool->work, NULL);
    *out = pool;
    return 0;
}

void blk_worker_pool_free(struct blk_worker_pool *pool)
{
    if (!pool)
        return;
    pthread_mutex_lock(&pool->lock);
    pool->stop = true;
    pthread_cond_broadcast(&pool->work);
    pthread_mutex_unlock(&pool->lock);
    for (uint32_t i = 0; i < pool->threads; i++)
        pthread_join(pool->thread[i], NULL);
    pthread_cond_destroy(&pool->work);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}
