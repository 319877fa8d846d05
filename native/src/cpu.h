/* Where a measuring thread runs, and what it costs there. */
#ifndef VHOST_CPU_H
#define VHOST_CPU_H

#include <errno.h>
#include <sched.h>
#include <stdint.h>
#include <time.h>

/* Binds the calling thread to one CPU. -EINVAL: there is no such CPU, or not for us. */
static inline int cpu_pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0 || cpu >= CPU_SETSIZE)
        return -EINVAL;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof(set), &set) < 0 ? -errno : 0;
}

/* The CPU time of the calling thread. */
static inline uint64_t cpu_time_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

#endif
