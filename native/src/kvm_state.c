/*
 * The state of a machine that stands still, as a sequence of records: a kind, a size, KVM's own
 * structure.  Records are written in the order in which KVM wants them set: special registers, with
 * the APIC's base, before the local APIC; that before the MSRs, of which the TSC deadline counts
 * only where the APIC's timer is in that mode; events, and the MP state last.
 */
#include "kvm.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct record {
    uint32_t kind;
    uint32_t size; /* of what follows */
};

struct writer {
    char *data;
    uint64_t size, used;
};

/* A structure that one ioctl reads and another sets. */
struct part {
    uint32_t kind;
    uint32_t size;
    unsigned long get, set;
};

enum {
    PART_IRQCHIP = 1,
    PART_CLOCK = 2,
    PART_SREGS = 10,
    PART_REGS = 11,
    PART_XSAVE = 12,
    PART_XCRS = 13,
    PART_MSRS = 14,
    PART_LAPIC = 15,
    PART_DEBUG = 16,
    PART_EVENTS = 17,
    PART_MP = 18,
    PART_TSC_KHZ = 19,
    MSRS_MAX = 512,
    IRQCHIPS = 3,
};

static const struct part before_msrs[] = {
    {PART_SREGS, sizeof(struct kvm_sregs), KVM_GET_SREGS, KVM_SET_SREGS},
    {PART_REGS, sizeof(struct kvm_regs), KVM_GET_REGS, KVM_SET_REGS},
    {PART_XSAVE, sizeof(struct kvm_xsave), KVM_GET_XSAVE, KVM_SET_XSAVE},
    {PART_XCRS, sizeof(struct kvm_xcrs), KVM_GET_XCRS, KVM_SET_XCRS},
    {PART_LAPIC, sizeof(struct kvm_lapic_state), KVM_GET_LAPIC, KVM_SET_LAPIC},
};
static const struct part after_msrs[] = {
    {PART_DEBUG, sizeof(struct kvm_debugregs), KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS},
    {PART_EVENTS, sizeof(struct kvm_vcpu_events), KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS},
    {PART_MP, sizeof(struct kvm_mp_state), KVM_GET_MP_STATE, KVM_SET_MP_STATE},
};

static void put(struct writer *w, uint32_t kind, const void *data, uint32_t size)
{
    struct record record = {kind, size};

    if (w->used + sizeof(record) + size <= w->size) {
        memcpy(w->data + w->used, &record, sizeof(record));
        memcpy(w->data + w->used + sizeof(record), data, size);
    }
    w->used += sizeof(record) + size;
}

static int64_t written(const struct writer *w)
{
    return w->size && w->used > w->size ? -ENOSPC : (int64_t)w->used;
}

static int put_parts(struct writer *w, int fd, const struct part *parts, size_t count)
{
    void *data = malloc(sizeof(struct kvm_xsave) + sizeof(struct kvm_lapic_state));
    int err = data ? 0 : -ENOMEM;

    for (size_t i = 0; i < count && err == 0; i++) {
        memset(data, 0, parts[i].size);
        err = kvm_ioctl(fd, parts[i].get, data);
        if (err >= 0) {
            err = 0;
            put(w, parts[i].kind, data, parts[i].size);
        }
    }
    free(data);
    return err;
}

static struct kvm_msr_list *msr_list(int kvm_fd)
{
    struct kvm_msr_list *list = calloc(1, sizeof(*list) + MSRS_MAX * sizeof(list->indices[0]));

    if (!list)
        return NULL;
    list->nmsrs = MSRS_MAX;
    if (kvm_ioctl(kvm_fd, KVM_GET_MSR_INDEX_LIST, list) < 0) {
        free(list);
        return NULL;
    }
    return list;
}

/* Those that this vCPU has: KVM lists what it knows, and a vCPU's CPUID may lack some of it. */
static int put_msrs(struct writer *w, struct vmm_vcpu *v)
{
    struct kvm_msr_list *list = msr_list(v->vm->kvm_fd);
    struct kvm_msr_entry *found = calloc(MSRS_MAX, sizeof(*found));
    struct kvm_msrs *one = calloc(1, sizeof(*one) + sizeof(one->entries[0]));
    uint32_t count = 0;

    for (uint32_t i = 0; list && found && one && i < list->nmsrs; i++) {
        one->nmsrs = 1;
        one->entries[0] = (struct kvm_msr_entry){.index = list->indices[i]};
        if (kvm_ioctl(v->fd, KVM_GET_MSRS, one) == 1)
            found[count++] = one->entries[0];
    }
    if (count)
        put(w, PART_MSRS, found, count * (uint32_t)sizeof(*found));
    free(list);
    free(found);
    free(one);
    return count ? 0 : -ENOMEM;
}

int64_t vmm_vcpu_save(struct vmm_vcpu *v, void *data, uint64_t size)
{
    struct writer w = {data, size, 0};
    /* The MP state may change what the events and the APIC say, so it is asked for first. */
    int32_t khz = kvm_ioctl(v->fd, KVM_GET_TSC_KHZ, NULL);
    int err = 0;

    if (khz > 0)
        put(&w, PART_TSC_KHZ, &khz, sizeof(khz));
    err = put_parts(&w, v->fd, before_msrs, ARRAY_SIZE(before_msrs));
    if (err == 0)
        err = put_msrs(&w, v);
    if (err == 0)
        err = put_parts(&w, v->fd, after_msrs, ARRAY_SIZE(after_msrs));
    return err < 0 ? err : written(&w);
}

/* KVM stops at the first MSR that it refuses to set: one by one, and those that are read-only for
 * this vCPU keep the value they have if it is the same. */
static int set_msrs(struct vmm_vcpu *v, const void *data, uint32_t size)
{
    const struct kvm_msr_entry *entries = data;
    struct kvm_msrs *one = calloc(1, sizeof(*one) + sizeof(one->entries[0]));
    int err = one && size % sizeof(*entries) == 0 ? 0 : -EINVAL;

    for (uint32_t i = 0; err == 0 && i < size / sizeof(*entries); i++) {
        one->nmsrs = 1;
        memcpy(&one->entries[0], &entries[i], sizeof(*entries));
        if (kvm_ioctl(v->fd, KVM_SET_MSRS, one) == 1)
            continue;
        one->entries[0].data = 0;
        if (kvm_ioctl(v->fd, KVM_GET_MSRS, one) == 1 && one->entries[0].data != entries[i].data)
            err = -EINVAL;
    }
    free(one);
    return err;
}

static int set_part(int fd, uint32_t kind, void *data, uint32_t size, const struct part *parts,
                    size_t count)
{
    for (size_t i = 0; i < count; i++)
        if (parts[i].kind == kind)
            return parts[i].size == size ? kvm_ioctl(fd, parts[i].set, data) : -EINVAL;
    return -EINVAL;
}

static int load_vcpu_record(struct vmm_vcpu *v, uint32_t kind, void *data, uint32_t size)
{
    int32_t khz;

    switch (kind) {
    case PART_MSRS:
        return set_msrs(v, data, size);
    case PART_TSC_KHZ:
        if (size != sizeof(khz))
            return -EINVAL;
        memcpy(&khz, data, sizeof(khz));
        if (kvm_ioctl(v->fd, KVM_GET_TSC_KHZ, NULL) == khz)
            return 0;
        return kvm_ioctl(v->fd, KVM_SET_TSC_KHZ, (void *)(uintptr_t)khz);
    case PART_SREGS:
    case PART_REGS:
    case PART_XSAVE:
    case PART_XCRS:
    case PART_LAPIC:
        return set_part(v->fd, kind, data, size, before_msrs, ARRAY_SIZE(before_msrs));
    default:
        return set_part(v->fd, kind, data, size, after_msrs, ARRAY_SIZE(after_msrs));
    }
}

static int load_vm_record(struct vmm_vm *vm, uint32_t kind, void *data, uint32_t size)
{
    struct kvm_clock_data *clock = data;

    if (kind == PART_IRQCHIP && size == sizeof(struct kvm_irqchip))
        return kvm_ioctl(vm->fd, KVM_SET_IRQCHIP, data);
    if (kind == PART_CLOCK && size == sizeof(*clock)) {
        clock->flags = 0; /* the guest's clock goes on from where it stood */
        return kvm_ioctl(vm->fd, KVM_SET_CLOCK, clock);
    }
    return -EINVAL;
}

/* Calls for each record with an aligned copy of its data. */
static int load(const void *data, uint64_t size, void *target, bool vcpu)
{
    const char *at = data, *end = at + size;
    int err = size ? 0 : -EINVAL;

    while (err == 0 && at < end) {
        struct record record;
        if ((size_t)(end - at) < sizeof(record))
            return -EINVAL;
        memcpy(&record, at, sizeof(record));
        at += sizeof(record);
        if (record.size > (size_t)(end - at))
            return -EINVAL;
        void *copy = malloc(record.size ? record.size : 1);
        if (!copy)
            return -ENOMEM;
        memcpy(copy, at, record.size);
        at += record.size;
        err = vcpu ? load_vcpu_record(target, record.kind, copy, record.size)
                   : load_vm_record(target, record.kind, copy, record.size);
        free(copy);
        err = err > 0 ? 0 : err;
    }
    return err;
}

int vmm_vcpu_load(struct vmm_vcpu *v, const void *data, uint64_t size)
{
    int err = load(data, size, v, true);

    /* Time has passed: the guest's watchdogs are not to take it for a hang. */
    if (err == 0)
        kvm_ioctl(v->fd, KVM_KVMCLOCK_CTRL, NULL);
    return err;
}

int64_t vmm_vm_save(struct vmm_vm *vm, void *data, uint64_t size)
{
    struct writer w = {data, size, 0};
    struct kvm_clock_data clock = {0};

    for (uint32_t i = 0; i < IRQCHIPS; i++) {
        struct kvm_irqchip chip = {.chip_id = i};
        int err = kvm_ioctl(vm->fd, KVM_GET_IRQCHIP, &chip);
        if (err < 0)
            return err;
        put(&w, PART_IRQCHIP, &chip, sizeof(chip));
    }
    int err = kvm_ioctl(vm->fd, KVM_GET_CLOCK, &clock);
    if (err < 0)
        return err;
    put(&w, PART_CLOCK, &clock, sizeof(clock));
    return written(&w);
}

int vmm_vm_load(struct vmm_vm *vm, const void *data, uint64_t size)
{
    return load(data, size, vm, false);
}
