/*
 * How the boot processor begins: what the boot protocol says of its registers, and MTRRs and local
 * APIC as firmware would leave them.
 */
#include "kvm.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum {
    MSR_MTRR_DEF_TYPE = 0x2ff,
    MTRR_ENABLED_WRITE_BACK = 0x806,
    MSR_MISC_ENABLE = 0x1a0,
    MISC_ENABLE_FAST_STRINGS = 1,
    APIC_LVT_LINT1 = 0x360,
    APIC_DELIVER_NMI = 0x400,
    RFLAGS_ALWAYS = 2,
};

static struct kvm_segment segment(const struct vmm_segment *s)
{
    return (struct kvm_segment){.base = s->base,
                                .limit = s->limit,
                                .selector = s->selector,
                                .type = s->type,
                                .present = s->present,
                                .dpl = s->dpl,
                                .db = s->db,
                                .s = s->s,
                                .l = s->l,
                                .g = s->g,
                                .avl = s->avl};
}

static int set_segments(struct vmm_vcpu *v, const struct vmm_entry *entry)
{
    struct kvm_sregs sregs;
    int err = kvm_ioctl(v->fd, KVM_GET_SREGS, &sregs);

    if (err < 0)
        return err;
    sregs.cs = segment(&entry->code);
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(&entry->data);
    sregs.tr = segment(&entry->task);
    sregs.gdt = (struct kvm_dtable){.base = entry->gdt_base, .limit = entry->gdt_limit};
    sregs.idt = (struct kvm_dtable){0};
    sregs.cr0 = entry->cr0;
    sregs.cr3 = entry->cr3;
    sregs.cr4 = entry->cr4;
    sregs.efer = entry->efer;
    return kvm_ioctl(v->fd, KVM_SET_SREGS, &sregs);
}

static int set_msrs(struct vmm_vcpu *v)
{
    static const struct kvm_msr_entry values[] = {
        {.index = MSR_MTRR_DEF_TYPE, .data = MTRR_ENABLED_WRITE_BACK},
        {.index = MSR_MISC_ENABLE, .data = MISC_ENABLE_FAST_STRINGS},
    };
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[1];
    } msrs;

    /* One by one: processors that lack one of them are as good without. */
    for (size_t i = 0; i < ARRAY_SIZE(values); i++) {
        memset(&msrs, 0, sizeof(msrs));
        msrs.head.nmsrs = 1;
        msrs.entry[0] = values[i];
        int set = kvm_ioctl(v->fd, KVM_SET_MSRS, &msrs);
        if (set < 0)
            return set;
    }
    return 0;
}

static void set_apic_register(struct kvm_lapic_state *apic, unsigned offset, uint32_t value)
{
    memcpy(apic->regs + offset, &value, sizeof(value));
}

static int set_apic(struct vmm_vcpu *v)
{
    struct kvm_lapic_state apic;
    int err = kvm_ioctl(v->fd, KVM_GET_LAPIC, &apic);

    if (err < 0)
        return err;
    set_apic_register(&apic, APIC_LVT_LINT1, APIC_DELIVER_NMI);
    return kvm_ioctl(v->fd, KVM_SET_LAPIC, &apic);
}

int vmm_vcpu_set_entry(struct vmm_vcpu *v, const struct vmm_entry *entry)
{
    struct kvm_regs regs = {
        .rip = entry->rip, .rsi = entry->rsi, .rbx = entry->rbx, .rflags = RFLAGS_ALWAYS};
    int err = set_segments(v, entry);

    if (err == 0)
        err = kvm_ioctl(v->fd, KVM_SET_REGS, &regs);
    if (err == 0)
        err = set_msrs(v);
    if (err == 0)
        err = set_apic(v);
    return err;
}
