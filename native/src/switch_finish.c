/*
 * What a sender left to the network card, and the receiver's driver cannot take unfinished: the
 * checksum is completed, a TCP segment is cut into those of the receiver's size.
 *
 * Guests of one kind take each other's frames as they are, so this need not be quick: the frame is
 * copied whole, and that copy is worked on, whatever its sender does meanwhile.
 */
#include "switch.h"

enum {
    ETHERTYPE_IPV4 = 0x0800,
    ETHERTYPE_IPV6 = 0x86dd,
    IPV4_HEADER = 20,
    IPV6_HEADER = 40,
    TCP_HEADER = 20,
    PROTOCOL_TCP = 6,
    /* Of one frame: 64 KiB in pieces of the smallest MSS that hosts have to take (RFC 9293) are
     * 122.  A sender that wants more of us keeps us from the others. */
    SEGMENTS_MAX = 128,
    TCP_FIN = 0x01,
    TCP_PSH = 0x08,
    TCP_CWR = 0x80,
};

static uint16_t get16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

static uint32_t get32(const uint8_t *at)
{
    return (uint32_t)get16(at) << 16 | get16(at + 2);
}

static void set16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}

static void set32(uint8_t *at, uint32_t value)
{
    set16(at, value >> 16);
    set16(at + 2, value);
}

/* The sum of RFC 1071, not yet folded. */
static uint64_t sum(const uint8_t *at, uint32_t len, uint64_t so_far)
{
    for (; len > 1; at += 2, len -= 2)
        so_far += get16(at);
    return len ? so_far + (uint32_t)(at[0] << 8) : so_far;
}

static uint16_t checksum(uint64_t sum)
{
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

/* The frame without its first `stripped` bytes, from `at` on; returns its end. */
static void copy_rest(const struct frame *f, uint8_t *at)
{
    uint32_t skip = f->skip;

    for (uint32_t i = 0; i < f->iovs; i++, skip = 0) {
        uint32_t part = (uint32_t)f->iov[i].iov_len - skip;
        memcpy(at, (const char *)f->iov[i].iov_base + skip, part);
        at += part;
    }
}

/* Puts `len` bytes of `rest`, what comes behind the Ethernet header. */
static void put(struct switch_port *to, struct vhost_queue *q, const struct frame *f, void *rest,
                uint32_t len)
{
    struct iovec iov = {.iov_base = rest, .iov_len = len};
    struct frame finished = *f;

    finished.vnet = (struct virtio_net_hdr){0};
    finished.len = f->stripped + len;
    finished.iov = &iov;
    finished.iovs = 1;
    finished.skip = 0;
    switch_put_finished(to, q, &finished);
}

/* A TCP segment that is to be cut; all places are counted from behind the Ethernet header. */
struct segment {
    uint8_t *ip;
    bool ipv6;
    uint32_t tcp, payload, end; /* where they begin */
};

/* Finds the parts of a frame that says that it is one. */
static bool find_parts(const struct frame *f, uint8_t *ip, struct segment *s)
{
    uint32_t len = f->len - f->stripped;
    uint8_t gso = f->vnet.gso_type & (uint8_t)~VIRTIO_NET_HDR_GSO_ECN;

    *s = (struct segment){.ip = ip, .ipv6 = gso == VIRTIO_NET_HDR_GSO_TCPV6, .end = len};
    s->tcp = (uint32_t)f->vnet.csum_start - f->stripped;
    if (get16(f->type) != (s->ipv6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4) ||
        f->vnet.csum_offset != 16 || s->tcp + TCP_HEADER > len)
        return false;
    if (s->ipv6) {
        /* Extension headers may come before TCP; what they are does not change with the length. */
        if (s->tcp < IPV6_HEADER || ip[0] >> 4 != 6)
            return false;
    } else if (s->tcp < IPV4_HEADER || ip[0] >> 4 != 4 || (ip[0] & 15u) * 4 != s->tcp ||
               ip[9] != PROTOCOL_TCP) {
        return false;
    }
    uint32_t tcp_header = (ip[s->tcp + 12] >> 4) * 4u;
    s->payload = s->tcp + tcp_header;
    return tcp_header >= TCP_HEADER && s->payload < len &&
           (len - s->payload) / f->vnet.gso_size < SEGMENTS_MAX;
}

/* Lengths, numbers, flags and checksums of a segment of `len` bytes whose payload stands `at` bytes
 * behind the first one's. */
static void finish_segment(const struct segment *s, uint8_t *ip, uint32_t len, uint32_t at,
                           uint32_t number)
{
    uint8_t *tcp = ip + s->tcp;
    uint32_t tcp_len = len - s->tcp;
    uint64_t pseudo = PROTOCOL_TCP + (uint64_t)tcp_len;

    if (s->ipv6) {
        set16(ip + 4, len - IPV6_HEADER);
        pseudo = sum(ip + 8, 32, pseudo);
    } else {
        set16(ip + 2, len);
        set16(ip + 4, get16(ip + 4) + number);
        set16(ip + 10, 0);
        set16(ip + 10, checksum(sum(ip, s->tcp, 0)));
        pseudo = sum(ip + 12, 8, pseudo);
    }
    set32(tcp + 4, get32(tcp + 4) + at);
    if (s->payload + at + (len - s->payload) < s->end)
        tcp[13] &= (uint8_t)~(TCP_FIN | TCP_PSH);
    if (number)
        tcp[13] &= (uint8_t)~TCP_CWR;
    set16(tcp + 16, 0);
    set16(tcp + 16, checksum(sum(tcp, tcp_len, pseudo)));
}

static void cut(struct switch_port *to, struct vhost_queue *q, const struct frame *f,
                const struct segment *s)
{
    uint8_t *segment = (uint8_t *)to->sw->segment;
    uint32_t payload = s->end - s->payload, number = 0;

    for (uint32_t at = 0; at < payload; at += f->vnet.gso_size, number++) {
        uint32_t part = payload - at < f->vnet.gso_size ? payload - at : f->vnet.gso_size;
        memcpy(segment, s->ip, s->payload);
        memcpy(segment + s->payload, s->ip + s->payload + at, part);
        finish_segment(s, segment, s->payload + part, at, number);
        put(to, q, f, segment, s->payload + part);
    }
}

void switch_finish(struct switch_port *to, struct vhost_queue *q, const struct frame *f)
{
    uint8_t *rest = (uint8_t *)to->sw->whole;
    uint32_t len = f->len - f->stripped;
    uint32_t start = (uint32_t)f->vnet.csum_start - f->stripped;
    struct segment s;

    copy_rest(f, rest);
    if (f->vnet.gso_type == VIRTIO_NET_HDR_GSO_NONE) {
        /* The field has the pseudo header's sum already (virtio 1.3, section 5.1.6.2.2). */
        uint16_t value = checksum(sum(rest + start, len - start, 0));
        /* 0 would mean that UDP has none (RFC 768); for all others it is the same sum. */
        set16(rest + start + f->vnet.csum_offset, value ? value : 0xffff);
        put(to, q, f, rest, len);
    } else if (find_parts(f, rest, &s)) {
        cut(to, q, f, &s);
    } else {
        port_count(to, VHOST_SWITCH_DROP_UNFINISHED, 1);
    }
}
