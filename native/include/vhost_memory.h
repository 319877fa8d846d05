/*
 * Guest memory, a part of libvhost's contract (libvhost.h has the conventions): regions, tables of
 * them, and what an IOMMU shows of a table.
 */
#ifndef VHOST_MEMORY_H
#define VHOST_MEMORY_H

#include <stdint.h>
#include <vhost_wire.h>

#ifdef __cplusplus
extern "C" {
#endif

/* cdef begin */

/* ---- guest memory ---- */

/* A mapping of a part of a file at a guest physical address; reference counted. */
struct vhost_region;
/* An immutable set of regions, sorted by guest address; reference counted. */
struct vhost_memory;

/* Maps `size` bytes at `offset` of the regular file `fd`.
 * -EINVAL: size 0, or an address or offset that wraps; -ENODEV: not a regular file;
 * -ENXIO: the file is shorter than the region; else what mmap(2) says. */
int vhost_region_map(int fd, uint64_t offset, uint64_t guest_addr, uint64_t size,
                     struct vhost_region **out);
/* The same as a private copy, made page by page as they are written: the file stays as it is, needs
 * not be open for writing, and must not change. */
int vhost_region_map_copy(int fd, uint64_t offset, uint64_t guest_addr, uint64_t size,
                          struct vhost_region **out);
void vhost_region_unref(struct vhost_region *region);

/* -EEXIST: two regions share guest addresses. */
int vhost_memory_new(struct vhost_region **regions, uint32_t count, struct vhost_memory **out);
void vhost_memory_unref(struct vhost_memory *memory);
/* The host address of [guest_addr, guest_addr + size) where one region holds it whole, or NULL. */
void *vhost_memory_translate(const struct vhost_memory *memory, uint64_t guest_addr, uint64_t size);
/* Gives [guest_addr, guest_addr + size) back to the host: until it is written it reads as zeroes,
 * or what the file holds where it is a private copy.
 * -EFAULT: not within one region; -EINVAL: not whole pages; else what madvise(2) says. */
int vhost_memory_discard(const struct vhost_memory *memory, uint64_t guest_addr, uint64_t size);

/* [iova, iova + size) is [guest_addr, guest_addr + size) of guest memory. */
struct vhost_translation {
    uint64_t iova;
    uint64_t size;
    uint64_t guest_addr;
    uint64_t access; /* of enum vhost_access */
};

/* What an IOMMU shows a device of `memory`, which it keeps: a table whose addresses are IOVAs.  A
 * queue in it waits for what is not there, and tells (VHOST_EVENT_MISS).  The entries are sorted.
 * -EINVAL: they are not, overlap, are empty, wrap, or `memory` is a view itself; -EFAULT: one does
 * not lie within one region. */
int vhost_memory_view(struct vhost_memory *memory, const struct vhost_translation *entries,
                      uint32_t count, struct vhost_memory **out);

/* cdef end */

#ifdef __cplusplus
}
#endif
#endif
