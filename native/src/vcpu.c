/*
 * A vCPU: a thread that runs the guest and answers its accesses.
 *
 * The control thread states a wish (run, stand, end) under the lock and kicks the thread out of
 * KVM_RUN: a signal whose handler sets immediate_exit, which also catches the moment before the
 * call.  The thread waits for the control thread's answer only where an access was told, and an end
 * interrupts that wait too: so no stop can hang.
 *
 * An access that was answered is completed by the next KVM_RUN.  Before standing still the thread
 * makes one more with immediate_exit set, so that the state KVM reports is that of a finished
 * instruction (KVM's api.rst, KVM_EXIT_MMIO).
 */
#include "kvm.h"
#include "libsandbox.h"
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static _Thread_local struct kvm_run *own_run;

static int kick_signal(void)
{
    return SIGRTMIN + 2;
}

static void on_kick(int signal)
{
    (void)signal;
    if (own_run)
        own_run->immediate_exit = 1;
}

static void kick_install(void)
{
    struct sigaction sa = {.sa_handler = on_kick};

    sigemptyset(&sa.sa_mask);
    sigaction(kick_signal(), &sa, NULL);
}

static void tell(struct vmm_vcpu *v, int kind, uint64_t value, int result)
{
    struct vhost_event event = {.kind = kind, .token = v->token, .value = value, .result = result};

    events_post(v->vm->events, &event);
}

static void report_exit(struct vmm_vcpu *v, enum vmm_exit why, int result)
{
    pthread_mutex_lock(&v->lock);
    v->over = true;
    pthread_mutex_unlock(&v->lock);
    tell(v, VMM_EVENT_EXIT, why, result);
}

/* Has the control thread answer; false: the vCPU ends. */
static bool wait_for_answer(struct vmm_vcpu *v, uint8_t *data)
{
    v->stats.told++;
    tell(v, VMM_EVENT_ACCESS, 0, 0);
    pthread_mutex_lock(&v->lock);
    while (v->waits && v->wish != VCPU_END)
        pthread_cond_wait(&v->changed, &v->lock);
    bool answered = !v->waits;
    if (answered && !v->told.write)
        memcpy(data, &v->answer, v->told.size);
    pthread_mutex_unlock(&v->lock);
    return answered;
}

static bool access_one(struct vmm_vcpu *v, int space, uint64_t address, uint8_t *data,
                       uint32_t size, bool write)
{
    struct vmm_access told;

    switch (bus_access(v->vm->bus, space, address, data, size, write, &told)) {
    case BUS_TOLD:
        pthread_mutex_lock(&v->lock);
        v->told = told;
        v->waits = true;
        pthread_mutex_unlock(&v->lock);
        return wait_for_answer(v, data);
    case BUS_LOST:
        v->stats.lost++;
        return true;
    default:
        return true;
    }
}

static bool on_pio(struct vmm_vcpu *v)
{
    struct kvm_run *run = v->run;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    v->stats.pio++;
    for (uint32_t i = 0; i < run->io.count; i++) {
        if (!access_one(v, VMM_SPACE_PIO, run->io.port, data, run->io.size,
                        run->io.direction == KVM_EXIT_IO_OUT))
            return false;
        data += run->io.size;
    }
    return true;
}

static bool on_mmio(struct vmm_vcpu *v)
{
    struct kvm_run *run = v->run;

    v->stats.mmio++;
    return access_one(v, VMM_SPACE_MMIO, run->mmio.phys_addr, run->mmio.data, run->mmio.len,
                      run->mmio.is_write);
}

/* Returns whether the guest can go on. */
static bool on_exit_reason(struct vmm_vcpu *v)
{
    struct kvm_run *run = v->run;

    switch (run->exit_reason) {
    case KVM_EXIT_IO:
        return on_pio(v);
    case KVM_EXIT_MMIO:
        return on_mmio(v);
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN:
        return true;
    case KVM_EXIT_SHUTDOWN:
        report_exit(v, VMM_EXIT_TRIPLE_FAULT, 0);
        return false;
    case KVM_EXIT_SYSTEM_EVENT:
        report_exit(v, VMM_EXIT_SYSTEM, (int)run->system_event.type);
        return false;
    case KVM_EXIT_FAIL_ENTRY:
        report_exit(v, VMM_EXIT_FAIL_ENTRY, (int)run->fail_entry.hardware_entry_failure_reason);
        return false;
    case KVM_EXIT_INTERNAL_ERROR:
        report_exit(v, VMM_EXIT_INTERNAL_ERROR, (int)run->internal.suberror);
        return false;
    default:
        report_exit(v, VMM_EXIT_UNKNOWN, (int)run->exit_reason);
        return false;
    }
}

/* One instruction may need several accesses: each is answered before it counts as finished. */
static void finish_access(struct vmm_vcpu *v)
{
    do
        v->run->immediate_exit = 1;
    while (ioctl(v->fd, KVM_RUN, 0) == 0 && on_exit_reason(v));
    v->run->immediate_exit = 0;
}

/* Waits until it may run; false: it is to end. */
static bool may_run(struct vmm_vcpu *v)
{
    pthread_mutex_lock(&v->lock);
    while (v->wish == VCPU_STAND || (v->over && v->wish != VCPU_END)) {
        if (v->pause_unanswered) {
            v->pause_unanswered = false;
            pthread_mutex_unlock(&v->lock);
            finish_access(v);
            tell(v, VMM_EVENT_PAUSED, 0, 0);
            pthread_mutex_lock(&v->lock);
            continue;
        }
        pthread_cond_wait(&v->changed, &v->lock);
    }
    bool run = v->wish == VCPU_RUN;
    pthread_mutex_unlock(&v->lock);
    return run;
}

static void run_once(struct vmm_vcpu *v)
{
    int result = ioctl(v->fd, KVM_RUN, 0);

    __atomic_fetch_add(&v->stats.exits, 1, __ATOMIC_RELAXED);
    if (v->ignored)
        v->ignored->first = v->ignored->last;
    if (result < 0) {
        int err = errno;
        v->run->immediate_exit = 0;
        /* EAGAIN: an application processor that has not been started yet. */
        if (err != EINTR && err != EAGAIN)
            report_exit(v, VMM_EXIT_ERROR, -err);
        return;
    }
    on_exit_reason(v);
}

static void pin(int cpu)
{
    cpu_set_t set;

    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET((unsigned)cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
}

static void *vcpu_thread(void *argument)
{
    struct vmm_vcpu *v = argument;
    sigset_t kick;
    char name[16];

    own_run = v->run;
    sigemptyset(&kick);
    sigaddset(&kick, kick_signal());
    pthread_sigmask(SIG_UNBLOCK, &kick, NULL);
    snprintf(name, sizeof(name), "vdev-vcpu%u", v->apic_id % 1000);
    pthread_setname_np(pthread_self(), name);
    pin(v->cpu);
    if (sandbox_enter(SANDBOX_VCPU) < 0)
        abort(); /* no guest runs outside the sandbox that was asked for */
    atomic_store(&v->tid, gettid());
    while (may_run(v))
        run_once(v);
    own_run = NULL;
    return NULL;
}

static int open_vcpu(struct vmm_vcpu *v, const struct vmm_cpuid *cpuid, uint32_t count)
{
    v->fd = kvm_ioctl(v->vm->fd, KVM_CREATE_VCPU, (void *)(uintptr_t)v->apic_id);
    if (v->fd < 0)
        return v->fd;
    void *run = mmap(NULL, (size_t)v->vm->run_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
    if (run == MAP_FAILED)
        return -errno;
    v->run = run;
    int ring = kvm_ioctl(v->vm->kvm_fd, KVM_CHECK_EXTENSION, (void *)KVM_CAP_COALESCED_MMIO);
    if (ring > 0)
        v->ignored = (void *)((char *)run + ring * getpagesize());
    v->cpuid = calloc(1, sizeof(*v->cpuid) + count * sizeof(v->cpuid->entries[0]));
    if (!v->cpuid)
        return -ENOMEM;
    v->cpuid->nent = count;
    for (uint32_t i = 0; i < count; i++)
        v->cpuid->entries[i] = (struct kvm_cpuid_entry2){.function = cpuid[i].function,
                                                         .index = cpuid[i].index,
                                                         .flags = cpuid[i].flags,
                                                         .eax = cpuid[i].eax,
                                                         .ebx = cpuid[i].ebx,
                                                         .ecx = cpuid[i].ecx,
                                                         .edx = cpuid[i].edx};
    return kvm_ioctl(v->fd, KVM_SET_CPUID2, v->cpuid);
}

int vmm_vcpu_new(struct vmm_vm *vm, uint32_t apic_id, uint64_t token, const struct vmm_cpuid *cpuid,
                 uint32_t count, struct vmm_vcpu **out)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    struct vmm_vcpu *v = calloc(1, sizeof(*v));

    if (!v)
        return -ENOMEM;
    pthread_once(&once, kick_install);
    v->vm = vm;
    v->apic_id = apic_id;
    v->token = token;
    v->fd = -1;
    v->cpu = -1;
    pthread_mutex_init(&v->lock, NULL);
    pthread_cond_init(&v->changed, NULL);
    int err = open_vcpu(v, cpuid, count);
    if (err < 0) {
        vmm_vcpu_free(v);
        return err;
    }
    *out = v;
    return 0;
}

static void wish(struct vmm_vcpu *v, enum vcpu_wish what)
{
    pthread_mutex_lock(&v->lock);
    v->wish = what;
    v->pause_unanswered = what == VCPU_STAND;
    pthread_cond_broadcast(&v->changed);
    pthread_mutex_unlock(&v->lock);
    if (v->has_thread && what != VCPU_RUN)
        pthread_kill(v->thread, kick_signal());
}

void vmm_vcpu_free(struct vmm_vcpu *v)
{
    if (!v)
        return;
    if (v->has_thread) {
        wish(v, VCPU_END);
        pthread_join(v->thread, NULL);
    }
    if (v->run)
        munmap(v->run, (size_t)v->vm->run_size);
    if (v->fd >= 0)
        close(v->fd);
    pthread_cond_destroy(&v->changed);
    pthread_mutex_destroy(&v->lock);
    free(v->cpuid);
    free(v);
}

int vmm_vcpu_start(struct vmm_vcpu *v, int cpu)
{
    sigset_t all, before;

    if (v->has_thread)
        return -EBUSY;
    v->cpu = cpu;
    /* Signals are for the control thread. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int err = pthread_create(&v->thread, NULL, vcpu_thread, v);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    v->has_thread = err == 0;
    return -err;
}

int vmm_vcpu_tid(const struct vmm_vcpu *v)
{
    return atomic_load(&((struct vmm_vcpu *)v)->tid);
}

void vmm_vcpu_pause(struct vmm_vcpu *v)
{
    wish(v, VCPU_STAND);
}

void vmm_vcpu_resume(struct vmm_vcpu *v)
{
    wish(v, VCPU_RUN);
}

int vmm_vcpu_access(struct vmm_vcpu *v, struct vmm_access *out)
{
    pthread_mutex_lock(&v->lock);
    bool waits = v->waits;
    *out = v->told;
    pthread_mutex_unlock(&v->lock);
    return waits ? 0 : -EINVAL;
}

int vmm_vcpu_answer(struct vmm_vcpu *v, uint64_t value)
{
    pthread_mutex_lock(&v->lock);
    bool waited = v->waits;
    v->waits = false;
    v->answer = value;
    pthread_cond_broadcast(&v->changed);
    pthread_mutex_unlock(&v->lock);
    return waited ? 0 : -EINVAL;
}

void vmm_vcpu_read_stats(const struct vmm_vcpu *v, struct vmm_vcpu_stats *out)
{
    clockid_t clock;
    struct timespec used;

    *out = v->stats;
    if (v->has_thread && pthread_getcpuclockid(v->thread, &clock) == 0 &&
        clock_gettime(clock, &used) == 0)
        out->run_ns = (uint64_t)used.tv_sec * 1000000000u + (uint64_t)used.tv_nsec;
}
