/*
 * The life of a switch and of its ports.
 *
 * Everything that frames look at (plugged ports, their settings, stations) is the iothread's own.
 * The control thread changes it by messages, which the iothread carries out between two passes.
 * Numbers of ports are given by the control thread, and a number is given anew only after the port
 * that had it was freed, which its unplugging went before.
 */
#include "switch.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

static struct switch_port *port_from(const struct vhost_device *device)
{
    return container_of((struct vhost_device *)(uintptr_t)device, struct switch_port, device);
}

/* ---- messages ---- */

enum switch_op { SWITCH_PLUG, SWITCH_UNPLUG, SWITCH_SET, SWITCH_ANNOUNCE, SWITCH_READ };

struct switch_message {
    struct io_op op;
    enum switch_op what;
    uint64_t token;
    struct vhost_switch *sw;
    struct switch_port *port;
    struct vhost_switch_port_settings set;
    uint8_t mac[6];
    struct vhost_switch_station *out;
    uint32_t max;
};

static void bind_station(struct switch_port *p)
{
    /* Where there is no room its own frames are checked all the same. */
    if (port_is(p, VHOST_SWITCH_BOUND) && p->set.vlan) {
        uint8_t end[8] = {0};
        memcpy(end + 2, p->set.mac, sizeof(p->set.mac));
        stations_bind(&p->sw->stations, key_of(p->set.vlan, end), p->id, p->sw->now_s);
    }
}

static void count_mirrors(struct vhost_switch *sw)
{
    sw->num_mirrors = 0;
    for (uint32_t i = 0; i < sw->num_plugged; i++)
        sw->num_mirrors += port_is(sw->port[sw->plugged[i]], VHOST_SWITCH_MIRROR);
}

static int plug(struct switch_port *p)
{
    struct vhost_switch *sw = p->sw;

    if (p->plugged)
        return -EBUSY;
    if (p->tap.fd >= 0) {
        int err = iothread_watch(sw->thread, &p->tap, EPOLLIN);
        if (err < 0)
            return err;
    }
    p->plugged = true;
    sw->port[p->id] = p;
    sw->plugged[sw->num_plugged++] = p->id;
    bind_station(p);
    count_mirrors(sw);
    return 0;
}

static int unplug(struct switch_port *p)
{
    struct vhost_switch *sw = p->sw;

    if (!p->plugged)
        return 0;
    if (p->tap.fd >= 0)
        iothread_watch(sw->thread, &p->tap, 0);
    stations_forget(&sw->stations, p->id);
    for (uint32_t i = 0; i < sw->num_plugged; i++) {
        if (sw->plugged[i] == p->id) {
            sw->plugged[i] = sw->plugged[--sw->num_plugged];
            break;
        }
    }
    sw->port[p->id] = NULL;
    p->plugged = false;
    count_mirrors(sw);
    return 0;
}

static void set(struct switch_port *p, const struct vhost_switch_port_settings *settings)
{
    /* Where its stations are may be another place now, and may be bound to it. */
    stations_forget(&p->sw->stations, p->id);
    p->set = *settings;
    p->rate = p->storm = (struct token_bucket){0};
    if (p->plugged) {
        bind_station(p);
        count_mirrors(p->sw);
    }
}

static void carry_out(struct io_op *op, int32_t ignored)
{
    struct switch_message *m = container_of(op, struct switch_message, op);
    struct vhost_switch *sw = m->sw;
    struct vhost_event event = {.kind = VHOST_EVENT_DONE, .token = m->token};

    (void)ignored;
    sw->now_s = (uint32_t)(iothread_now(sw->thread) / 1000000000u);
    switch (m->what) {
    case SWITCH_PLUG:
        event.result = plug(m->port);
        break;
    case SWITCH_UNPLUG:
        event.result = unplug(m->port);
        break;
    case SWITCH_SET:
        set(m->port, &m->set);
        break;
    case SWITCH_ANNOUNCE:
        if (m->port->plugged)
            switch_announce(m->port, m->mac);
        break;
    case SWITCH_READ:
        event.value = stations_read(&sw->stations, m->out, m->max, sw->now_s);
        break;
    }
    free(m);
    events_post(iothread_events(sw->thread), &event);
}

static int post(struct vhost_switch *sw, struct switch_message message)
{
    struct switch_message *m = malloc(sizeof(*m));

    if (!m)
        return -ENOMEM;
    *m = message;
    m->sw = sw;
    m->op.done = carry_out;
    iothread_complete(sw->thread, &m->op, 0);
    return 0;
}

int vhost_switch_plug(struct vhost_device *port, uint64_t token)
{
    struct switch_port *p = port_from(port);

    return post(p->sw, (struct switch_message){.what = SWITCH_PLUG, .port = p, .token = token});
}

int vhost_switch_unplug(struct vhost_device *port, uint64_t token)
{
    struct switch_port *p = port_from(port);

    return post(p->sw, (struct switch_message){.what = SWITCH_UNPLUG, .port = p, .token = token});
}

static bool is_valid(const struct vhost_switch_port_settings *s)
{
    /* 0 and 4095 are no VLANs. */
    return s->vlan < VLAN_ID && !has_bit(s->trunk[0], 0) &&
           !has_bit(s->trunk[VLAN_ID / 64], VLAN_ID % 64) &&
           !(s->flags & VHOST_SWITCH_BOUND && is_group(s->mac));
}

int vhost_switch_set(struct vhost_device *port, const struct vhost_switch_port_settings *settings,
                     uint64_t token)
{
    struct switch_port *p = port_from(port);

    if (!is_valid(settings))
        return -EINVAL;
    return post(p->sw, (struct switch_message){
                           .what = SWITCH_SET, .port = p, .set = *settings, .token = token});
}

int vhost_switch_announce(struct vhost_device *port, const uint8_t *mac, uint64_t token)
{
    struct switch_port *p = port_from(port);
    struct switch_message m = {.what = SWITCH_ANNOUNCE, .port = p, .token = token};

    memcpy(m.mac, mac, sizeof(m.mac));
    return post(p->sw, m);
}

int vhost_switch_read_stations(struct vhost_switch *sw, struct vhost_switch_station *out,
                               uint32_t max, uint64_t token)
{
    return post(
        sw, (struct switch_message){.what = SWITCH_READ, .out = out, .max = max, .token = token});
}

uint32_t vhost_switch_port_number(const struct vhost_device *port)
{
    return port_from(port)->id;
}

void vhost_switch_read_counters(const struct vhost_device *port, uint64_t *out)
{
    const struct switch_port *p = port_from(port);

    for (unsigned i = 0; i < VHOST_SWITCH_COUNTERS; i++)
        out[i] = __atomic_load_n(&p->counter[i], __ATOMIC_RELAXED);
}

/* ---- a card's queues ---- */

static inline bool receives(const struct vhost_queue *q)
{
    return q->index % 2 == 0;
}

static int queue_open(struct vhost_queue *q)
{
    struct switch_queue *state = calloc(1, sizeof(*state));

    if (!state)
        return -ENOMEM;
    state->header_len = net_header_len(q->features);
    state->mergeable = has_bit(q->features, VIRTIO_NET_F_MRG_RXBUF);
    q->state = state;
    return 0;
}

static void queue_close(struct vhost_queue *q)
{
    free(q->state);
    q->state = NULL;
}

/* Behind an IOMMU a frame is lost for each buffer that has no translation yet: so buffers are
 * looked at when they come, and what is lacking is asked for before a frame needs it. */
static cold_path void look_ahead(struct vhost_queue *q)
{
    uint16_t head[NET_BATCH];
    uint32_t n = 0, most = ring_pending(q);
    struct chain c;

    for (; n < most && n < NET_BATCH && ring_pop(q, &c); n++)
        head[n] = c.head;
    while (n)
        ring_unpop(q, head[--n]);
}

static bool service(struct vhost_queue *q)
{
    if (!receives(q))
        return switch_tx_service(q);
    port_of(q)->rx[q->index / 2] = q;
    /* It waits for frames, not for buffers: where there are none, frames are dropped. */
    q->no_kicks = !q->memory->behind;
    if (q->memory->behind && queue_may_pop(q))
        look_ahead(q);
    return false;
}

static void detach(struct vhost_queue *q)
{
    if (receives(q))
        port_of(q)->rx[q->index / 2] = NULL;
}

static void port_free(struct vhost_device *device)
{
    struct switch_port *p = port_from(device);

    p->sw->taken[p->id] = false;
    p->sw->num_taken--;
    if (p->tap.fd >= 0)
        close(p->tap.fd);
    free(p);
}

/* ---- life ---- */

static int port_new(struct vhost_switch *sw, uint32_t num_pairs, int tap,
                    const struct vhost_switch_port_settings *settings, struct vhost_device **out)
{
    static const struct device_ops ops = {
        .queue_open = queue_open,
        .queue_close = queue_close,
        .detach = detach,
        .service = service,
        .free = port_free,
        .in_order = true,
        .chain_max = UIO_MAXIOV,
    };
    uint32_t id = 0;

    if (!is_valid(settings))
        return -EINVAL;
    while (id < VHOST_SWITCH_PORTS && sw->taken[id])
        id++;
    if (id == VHOST_SWITCH_PORTS)
        return -ENOSPC;
    struct switch_port *p = calloc(1, sizeof(*p) + num_pairs * sizeof(struct vhost_queue *));
    if (!p)
        return -ENOMEM;
    int err = device_init(&p->device, &ops, 2 * num_pairs);
    if (err < 0) {
        free(p);
        return err;
    }
    p->sw = sw;
    p->id = (uint16_t)id;
    p->set = *settings;
    p->num_pairs = num_pairs;
    p->tap = (struct watch){.ready = switch_tap_ready, .fd = tap};
    sw->taken[id] = true;
    sw->num_taken++;
    *out = &p->device;
    return 0;
}

int vhost_switch_card_new(struct vhost_switch *sw, uint32_t num_pairs,
                          const struct vhost_switch_port_settings *settings,
                          struct vhost_device **out)
{
    if (num_pairs == 0 || 2 * (uint64_t)num_pairs > VHOST_USER_VRING_INDEX_MASK + 1)
        return -EINVAL;
    return port_new(sw, num_pairs, -1, settings, out);
}

int vhost_switch_tap_new(struct vhost_switch *sw, int tap_fd,
                         const struct vhost_switch_port_settings *settings,
                         struct vhost_device **out)
{
    int flags = fcntl(tap_fd, F_GETFL);

    if (flags < 0 || fcntl(tap_fd, F_SETFL, flags | O_NONBLOCK) < 0)
        return -errno;
    int tap = fcntl(tap_fd, F_DUPFD_CLOEXEC, 0);
    if (tap < 0)
        return -errno;
    int err = port_new(sw, 0, tap, settings, out);
    if (err < 0)
        close(tap);
    return err;
}

int vhost_switch_new(const struct vhost_switch_config *config, struct vhost_iothread *thread,
                     struct vhost_switch **out)
{
    struct vhost_switch *sw = calloc(1, sizeof(*sw));

    if (!sw)
        return -ENOMEM;
    int err = stations_open(&sw->stations, config->stations, config->age_s);
    if (err < 0) {
        free(sw);
        return err;
    }
    sw->thread = thread;
    *out = sw;
    return 0;
}

int vhost_switch_free(struct vhost_switch *sw)
{
    if (!sw)
        return 0;
    if (sw->num_taken)
        return -EBUSY;
    stations_close(&sw->stations);
    free(sw);
    return 0;
}
