/*
 * Events: a bounded-by-demand list from any iothread to the one control thread, with an eventfd
 * for its event loop.  Off the data path, so a mutex is enough.
 */
#include "internal.h"
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct vhost_events {
    pthread_mutex_t lock;
    struct vhost_event *item;
    size_t count, room;
    int fd;
};

int vhost_events_new(struct vhost_events **out)
{
    struct vhost_events *e = calloc(1, sizeof(*e));

    if (!e)
        return -ENOMEM;
    e->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->fd < 0) {
        int err = -errno;
        free(e);
        return err;
    }
    pthread_mutex_init(&e->lock, NULL);
    *out = e;
    return 0;
}

void vhost_events_free(struct vhost_events *e)
{
    if (!e)
        return;
    close(e->fd);
    pthread_mutex_destroy(&e->lock);
    free(e->item);
    free(e);
}

int vhost_events_fd(const struct vhost_events *e)
{
    return e->fd;
}

void events_post(struct vhost_events *e, const struct vhost_event *event)
{
    pthread_mutex_lock(&e->lock);
    if (e->count == e->room) {
        size_t room = e->room ? 2 * e->room : 64;
        struct vhost_event *item = realloc(e->item, room * sizeof(*item));
        /* Losing an event would leave the control thread waiting for ever. */
        if (!item)
            abort();
        e->item = item;
        e->room = room;
    }
    e->item[e->count++] = *event;
    pthread_mutex_unlock(&e->lock);
    eventfd_write(e->fd, 1);
}

int vhost_events_read(struct vhost_events *e, struct vhost_event *out, int max)
{
    eventfd_t ignored;

    /* Cleared before the list is read: an event posted in between makes it readable again. */
    eventfd_read(e->fd, &ignored);
    pthread_mutex_lock(&e->lock);
    size_t n = e->count < (size_t)max ? e->count : (size_t)max;
    e->count -= n;
    if (n) {
        memcpy(out, e->item, n * sizeof(*out));
        memmove(e->item, e->item + n, e->count * sizeof(*out));
    }
    bool more = e->count > 0;
    pthread_mutex_unlock(&e->lock);
    if (more)
        eventfd_write(e->fd, 1);
    return (int)n;
}
