/*
 * The iothread's two rooms.
 *
 *   iothread.c       its life, and the mail that other threads put into it
 *   iothread_loop.c  the loop: which queues are served, when it polls, when it sleeps
 */
#ifndef VHOST_IOTHREAD_H
#define VHOST_IOTHREAD_H

#include "internal.h"
#include <liburing.h>
#include <pthread.h>
#include <semaphore.h>

/* What an epoll event's data points to is told by its low bits (all are 8-byte aligned). */
enum { TAG_WATCH = 0, TAG_KICK = 1, TAG_WAKE = 2, TAG_URING = 3, TAG_MASK = 3 };

struct vhost_iothread {
    struct vhost_iothread_config config;
    struct vhost_events *events;
    pthread_t thread;
    sem_t ready;
    int epoll_fd, wake_fd, error;
    pid_t tid;

    pthread_mutex_t lock; /* messages, completions */
    struct queue_message *message, **message_tail;
    struct io_op *completed;
    atomic_bool mail; /* either list has something */
    atomic_bool stop;
    atomic_uint num_queues;

    struct io_uring uring;
    bool has_uring;
    struct vhost_queue *queues;
    struct vhost_queue *dirty;
    struct vhost_queue **polling;
    uint32_t num_polling;
    uint64_t poll_ns, poll_max_ns;
    uint64_t now; /* read once for each batch of events, completions or messages */
    struct vhost_iothread_stats stats;
};

/* iothread.c: carries out the messages and completions that have come. */
void iothread_take_mail(struct vhost_iothread *t);
/* iothread_loop.c: runs until t->stop. */
void iothread_loop(struct vhost_iothread *t);
int iothread_epoll_add(struct vhost_iothread *t, int fd, uint32_t events, void *ptr, unsigned tag);

#endif
