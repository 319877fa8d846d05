/*
 * How far apart two CPUs are.  Virtual CPUs move over the host's cores: the same two are
 * sometimes neighbours and sometimes not, and a measurement across them is worth as much as the
 * record of which it was.
 */
#include "cpu.h"
#include "internal.h"
#include <pthread.h>
#include <stdlib.h>

enum { BOUNCES = 1000 };

struct ping {
    _Alignas(64) atomic_uint turn; /* even: ours, odd: theirs */
    _Alignas(64) unsigned end;
    int cpu;
};

static void *echo(void *arg)
{
    struct ping *p = arg;

    cpu_pin(p->cpu);
    for (unsigned turn = 1; turn < p->end; turn += 2) {
        while (atomic_load_explicit(&p->turn, memory_order_acquire) != turn)
            cpu_relax();
        atomic_store_explicit(&p->turn, turn + 1, memory_order_release);
    }
    return NULL;
}

static void bounce(struct ping *p, double *time, uint32_t rounds)
{
    unsigned turn = 0;

    for (uint32_t round = 0; round < rounds; round++) {
        uint64_t start = now_ns();
        for (int i = 0; i < BOUNCES; i++, turn += 2) {
            atomic_store_explicit(&p->turn, turn + 1, memory_order_release);
            while (atomic_load_explicit(&p->turn, memory_order_acquire) != turn + 2)
                cpu_relax();
        }
        time[round] = (double)(now_ns() - start) / BOUNCES;
    }
}

static int by_value(const void *a, const void *b)
{
    const double *x = a, *y = b;

    return (*x > *y) - (*x < *y);
}

int vhost_driver_ping(int cpu_a, int cpu_b, uint32_t rounds, double *round_trip_ns)
{
    cpu_set_t before;
    pthread_t thread;

    /* Two threads that spin for each other need two CPUs that are really there. */
    if (cpu_a == cpu_b || rounds == 0 || rounds > 100000)
        return -EINVAL;
    if (sched_getaffinity(0, sizeof(before), &before) < 0)
        return -errno;
    struct ping p = {.end = 2 * rounds * BOUNCES, .cpu = cpu_b};
    double *time = calloc(rounds, sizeof(*time));
    int err = time ? cpu_pin(cpu_b) : -ENOMEM;
    if (!err)
        err = cpu_pin(cpu_a);
    if (!err)
        err = -pthread_create(&thread, NULL, echo, &p);
    if (!err) {
        bounce(&p, time, rounds);
        pthread_join(thread, NULL);
        qsort(time, rounds, sizeof(*time), by_value);
        *round_trip_ns = time[rounds / 2];
    }
    free(time);
    sched_setaffinity(0, sizeof(before), &before);
    return err;
}
