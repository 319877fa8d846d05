/*
 * A 8250 with the FIFOs of a 16550A (PC16550D).  What the guest sends goes out by write(2) at once,
 * so its transmitter is always empty; what it shall read waits in a FIFO of our own.
 */
#include "bus.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { DATA, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

enum {
    IER_RECEIVED = 1,
    IER_SENT = 2,
    IIR_NONE = 1,
    IIR_SENT = 2,
    IIR_RECEIVED = 4,
    IIR_FIFOS = 0xc0,
    FCR_ENABLE = 1,
    FCR_CLEAR_RECEIVED = 2,
    FCR_KEPT = 0xc9,
    IER_KEPT = 0x0f,
    MCR_KEPT = 0x1f,
    LCR_DIVISOR = 0x80,
    MCR_LOOP = 0x10,
    LSR_RECEIVED = 1,
    LSR_EMPTY = 0x60, /* holding register and shift register */
    MSR_READY = 0xb0, /* carrier, data set ready, clear to send */
};

struct vmm_serial {
    struct vmm_window window;
    pthread_mutex_t lock;
    int out_fd, irq_fd, room_fd;
    struct vmm_serial_state state;
    bool refused; /* bytes since the FIFO was last empty */
    struct vmm_serial_stats stats;
};

/* The interrupt is an edge: one for each new reason. */
static void interrupt(struct vmm_serial *s)
{
    bool received = s->state.count && (s->state.ier & IER_RECEIVED);
    bool sent = s->state.sent && (s->state.ier & IER_SENT);

    if (received || sent)
        eventfd_write(s->irq_fd, 1);
}

static void push(struct vmm_serial *s, uint8_t byte)
{
    if (s->state.count == VMM_SERIAL_FIFO)
        return;
    s->state.fifo[(s->state.head + s->state.count++) % VMM_SERIAL_FIFO] = byte;
}

static void transmit(struct vmm_serial *s, uint8_t byte)
{
    if (s->state.mcr & MCR_LOOP) {
        push(s, byte);
    } else {
        s->stats.sent++;
        if (write(s->out_fd, &byte, 1) != 1)
            s->stats.dropped++;
    }
    s->state.sent = true;
    interrupt(s);
}

/* Who waits for room hears of it once, whichever way it came. */
static void tell_room(struct vmm_serial *s)
{
    if (s->refused && !s->state.count && !(s->state.mcr & MCR_LOOP)) {
        s->refused = false;
        eventfd_write(s->room_fd, 1);
    }
}

static uint8_t receive(struct vmm_serial *s)
{
    if (!s->state.count)
        return 0;
    uint8_t byte = s->state.fifo[s->state.head];
    s->state.head = (s->state.head + 1) % VMM_SERIAL_FIFO;
    if (--s->state.count)
        interrupt(s);
    tell_room(s);
    return byte;
}

static uint8_t identify(struct vmm_serial *s)
{
    uint8_t fifos = s->state.fcr & FCR_ENABLE ? IIR_FIFOS : 0;

    if (s->state.count && (s->state.ier & IER_RECEIVED))
        return fifos | IIR_RECEIVED;
    if (s->state.sent && (s->state.ier & IER_SENT)) {
        s->state.sent = false; /* reading the register acknowledges it */
        return fifos | IIR_SENT;
    }
    return fifos | IIR_NONE;
}

static uint8_t read_register(struct vmm_serial *s, uint32_t offset)
{
    switch (offset) {
    case DATA:
        return s->state.lcr & LCR_DIVISOR ? s->state.divisor[0] : receive(s);
    case IER:
        return s->state.lcr & LCR_DIVISOR ? s->state.divisor[1] : s->state.ier;
    case IIR_FCR:
        return identify(s);
    case LCR:
        return s->state.lcr;
    case MCR:
        return s->state.mcr;
    case LSR:
        return LSR_EMPTY | (s->state.count ? LSR_RECEIVED : 0);
    case MSR:
        /* In loopback the outputs come back: DTR, RTS, OUT1, OUT2 as DSR, CTS, RI, DCD. */
        if (s->state.mcr & MCR_LOOP)
            return (uint8_t)((s->state.mcr & 0xc) << 4 | (s->state.mcr & 2) << 3 |
                             (s->state.mcr & 1) << 5);
        return MSR_READY;
    default:
        return s->state.scr;
    }
}

static void write_register(struct vmm_serial *s, uint32_t offset, uint8_t byte)
{
    switch (offset) {
    case DATA:
        if (s->state.lcr & LCR_DIVISOR)
            s->state.divisor[0] = byte;
        else
            transmit(s, byte);
        break;
    case IER:
        if (s->state.lcr & LCR_DIVISOR) {
            s->state.divisor[1] = byte;
            break;
        }
        if (byte & ~s->state.ier & IER_SENT)
            s->state.sent = true; /* the transmitter is empty: that is news to who just asked */
        s->state.ier = byte & IER_KEPT;
        interrupt(s);
        break;
    case IIR_FCR:
        s->state.fcr = byte & FCR_KEPT;
        if (byte & FCR_CLEAR_RECEIVED) {
            s->state.count = 0;
            tell_room(s);
        }
        break;
    case LCR:
        s->state.lcr = byte;
        break;
    case MCR:
        s->state.mcr = byte & MCR_KEPT;
        tell_room(s);
        break;
    case SCR:
        s->state.scr = byte;
        break;
    default:
        break;
    }
}

static bool access_serial(struct vmm_window *window, uint32_t offset, uint8_t *data, uint32_t size,
                          bool write, struct vmm_access *told)
{
    struct vmm_serial *s = container_of(window, struct vmm_serial, window);

    (void)told;
    pthread_mutex_lock(&s->lock);
    for (uint32_t i = 0; i < size; i++) {
        if (write)
            write_register(s, offset + i, data[i]);
        else
            data[i] = read_register(s, offset + i);
    }
    pthread_mutex_unlock(&s->lock);
    return false;
}

int vmm_serial_new(int out_fd, int irq_fd, int room_fd, struct vmm_serial **out)
{
    struct vmm_serial *s = calloc(1, sizeof(*s));

    if (!s)
        return -ENOMEM;
    s->out_fd = dup(out_fd);
    s->irq_fd = dup(irq_fd);
    s->room_fd = dup(room_fd);
    pthread_mutex_init(&s->lock, NULL);
    s->window = (struct vmm_window){.access = access_serial, .size = VMM_SERIAL_SIZE};
    vmm_serial_reset(s);
    if (s->out_fd < 0 || s->irq_fd < 0 || s->room_fd < 0) {
        vmm_serial_free(s);
        return -EMFILE;
    }
    *out = s;
    return 0;
}

void vmm_serial_free(struct vmm_serial *s)
{
    if (!s)
        return;
    if (s->out_fd >= 0)
        close(s->out_fd);
    if (s->irq_fd >= 0)
        close(s->irq_fd);
    if (s->room_fd >= 0)
        close(s->room_fd);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

struct vmm_window *vmm_serial_window(struct vmm_serial *s)
{
    return &s->window;
}

uint32_t vmm_serial_receive(struct vmm_serial *s, const uint8_t *data, uint32_t size)
{
    pthread_mutex_lock(&s->lock);
    /* In loopback the receiver hears the transmitter alone. */
    uint32_t room = s->state.mcr & MCR_LOOP ? 0 : VMM_SERIAL_FIFO - s->state.count;
    uint32_t taken = size < room ? size : room;
    for (uint32_t i = 0; i < taken; i++)
        push(s, data[i]);
    s->refused = taken < size;
    s->stats.received += taken;
    if (taken)
        interrupt(s);
    pthread_mutex_unlock(&s->lock);
    return taken;
}

void vmm_serial_reset(struct vmm_serial *s)
{
    pthread_mutex_lock(&s->lock);
    /* 8 bits, no parity, 115200 baud */
    s->state = (struct vmm_serial_state){.lcr = 3, .divisor = {1, 0}};
    tell_room(s);
    pthread_mutex_unlock(&s->lock);
}

void vmm_serial_read_stats(const struct vmm_serial *serial, struct vmm_serial_stats *out)
{
    struct vmm_serial *s = (struct vmm_serial *)serial;

    pthread_mutex_lock(&s->lock);
    *out = s->stats;
    pthread_mutex_unlock(&s->lock);
}

void vmm_serial_save(struct vmm_serial *s, struct vmm_serial_state *out)
{
    pthread_mutex_lock(&s->lock);
    *out = s->state;
    pthread_mutex_unlock(&s->lock);
}

int vmm_serial_load(struct vmm_serial *s, const struct vmm_serial_state *state)
{
    if (state->head >= VMM_SERIAL_FIFO || state->count > VMM_SERIAL_FIFO ||
        state->ier & ~IER_KEPT || state->mcr & ~MCR_KEPT || state->fcr & ~FCR_KEPT ||
        state->sent > 1)
        return -EINVAL;
    pthread_mutex_lock(&s->lock);
    s->state = *state;
    tell_room(s);
    interrupt(s); /* one too many does no harm, one too few stops the guest's driver */
    pthread_mutex_unlock(&s->lock);
    return 0;
}
