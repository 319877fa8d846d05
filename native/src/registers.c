/*
 * A window made of data: stored bytes, the bits that the guest may change, banked rows, and which
 * accesses the control thread is told of.
 */
#include "bus.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct registers {
    struct vmm_window window; /* the first member: what the API hands out */
    pthread_mutex_t lock;
    uint64_t token;
    uint32_t num_banks;
    struct vmm_bank bank[VMM_WINDOW_BANKS];
    uint8_t *row[VMM_WINDOW_BANKS]; /* rows * size bytes each */
    uint8_t *value;
    uint8_t *writable;
    uint8_t *flags;
};

static struct registers *registers_of(struct vmm_window *window)
{
    return container_of(window, struct registers, window);
}

static int bank_at(const struct registers *r, uint32_t offset)
{
    for (uint32_t i = 0; i < r->num_banks; i++)
        if (offset - r->bank[i].offset < r->bank[i].size)
            return (int)i;
    return -1;
}

static uint32_t selected(const struct registers *r, const struct vmm_bank *bank)
{
    uint32_t row = 0;

    memcpy(&row, r->value + bank->selector, bank->selector_size);
    return row;
}

/* Where the byte at `offset` of a row is stored; NULL: nowhere. */
static uint8_t *place_of(struct registers *r, uint32_t row, uint32_t offset)
{
    int i = bank_at(r, offset);

    if (i < 0)
        return row == 0 ? r->value + offset : NULL;
    const struct vmm_bank *bank = &r->bank[i];
    if (row >= bank->rows)
        return NULL;
    return r->row[i] + (size_t)row * bank->size + (offset - bank->offset);
}

static uint8_t *selected_place(struct registers *r, uint32_t offset)
{
    int i = bank_at(r, offset);

    return place_of(r, i < 0 ? 0 : selected(r, &r->bank[i]), offset);
}

/* Returns the flags that the write raised. */
static uint8_t write_byte(struct registers *r, uint32_t offset, uint8_t written)
{
    uint8_t *place = selected_place(r, offset);
    uint8_t flags = r->flags[offset], mask = r->writable[offset];

    if (flags & VMM_ACKNOWLEDGES && offset >= 4) {
        r->value[offset - 4] &= (uint8_t)~(written & mask);
        return flags & VMM_TELL_WRITE;
    }
    if (!place)
        return 0;
    uint8_t before = *place;
    if (flags & VMM_WRITE_ONE_CLEARS)
        *place = before & (uint8_t)~(written & mask);
    else
        *place = (uint8_t)((before & ~mask) | (written & mask));
    return flags & (*place != before ? VMM_TELL_WRITE | VMM_TELL_CHANGE : VMM_TELL_WRITE);
}

static uint8_t read_byte(struct registers *r, uint32_t offset, uint8_t *out)
{
    const uint8_t *place = selected_place(r, offset);

    *out = place ? *place : 0;
    return place ? r->flags[offset] & VMM_TELL_READ : 0;
}

static bool access_registers(struct vmm_window *window, uint32_t offset, uint8_t *data,
                             uint32_t size, bool write, struct vmm_access *told)
{
    struct registers *r = registers_of(window);
    uint8_t raised = 0;
    uint32_t row = 0;
    bool row_known = false;

    pthread_mutex_lock(&r->lock);
    for (uint32_t i = 0; i < size; i++) {
        uint32_t at = offset + i;
        uint8_t flags = write ? write_byte(r, at, data[i]) : read_byte(r, at, &data[i]);
        int bank = flags ? bank_at(r, at) : -1;
        /* Now: an access that goes on may write the selector. */
        if (bank >= 0 && !row_known) {
            row = selected(r, &r->bank[bank]);
            row_known = true;
        }
        raised |= flags;
    }
    pthread_mutex_unlock(&r->lock);
    if (!raised)
        return false;
    *told = (struct vmm_access){
        .token = r->token, .offset = offset, .row = row, .size = size, .write = write};
    memcpy(&told->value, data, size);
    return true;
}

static int check_banks(const struct vmm_window_config *config)
{
    if (config->num_banks > VMM_WINDOW_BANKS)
        return -EINVAL;
    for (uint32_t i = 0; i < config->num_banks; i++) {
        const struct vmm_bank *bank = &config->bank[i];
        if (bank->size == 0 || bank->rows == 0 || bank->offset > config->size ||
            bank->size > config->size - bank->offset || bank->selector_size == 0 ||
            bank->selector_size > sizeof(uint32_t) || bank->selector > config->size ||
            bank->selector_size > config->size - bank->selector)
            return -EINVAL;
        for (uint32_t n = 0; n < config->num_banks; n++) {
            const struct vmm_bank *other = &config->bank[n];
            /* A selector that is itself banked would have no one value. */
            if (bank->selector + bank->selector_size > other->offset &&
                bank->selector < other->offset + other->size)
                return -EINVAL;
            if (n < i && bank->offset < other->offset + other->size &&
                other->offset < bank->offset + bank->size)
                return -EINVAL;
        }
    }
    return 0;
}

static int fill(struct registers *r, const struct vmm_window_config *config)
{
    uint32_t size = config->size;

    r->value = malloc(size);
    r->writable = malloc(size);
    r->flags = malloc(size);
    if (!r->value || !r->writable || !r->flags)
        return -ENOMEM;
    memcpy(r->value, config->initial, size);
    memcpy(r->writable, config->writable, size);
    memcpy(r->flags, config->flags, size);
    for (uint32_t i = 0; i < config->num_banks; i++) {
        const struct vmm_bank *bank = &config->bank[i];
        r->row[i] = calloc(bank->rows, bank->size);
        if (!r->row[i])
            return -ENOMEM;
        for (uint32_t row = 0; row < bank->rows; row++)
            memcpy(r->row[i] + (size_t)row * bank->size, config->initial + bank->offset,
                   bank->size);
    }
    return 0;
}

int vmm_window_new(const struct vmm_window_config *config, struct vmm_window **out)
{
    if (config->size == 0 || config->size > VMM_WINDOW_MAX || check_banks(config) < 0)
        return -EINVAL;
    struct registers *r = calloc(1, sizeof(*r));
    if (!r)
        return -ENOMEM;
    pthread_mutex_init(&r->lock, NULL);
    r->window = (struct vmm_window){.access = access_registers, .size = config->size};
    r->token = config->token;
    r->num_banks = config->num_banks;
    memcpy(r->bank, config->bank, sizeof(r->bank));
    if (fill(r, config) < 0) {
        vmm_window_free(&r->window);
        return -ENOMEM;
    }
    *out = &r->window;
    return 0;
}

void vmm_window_free(struct vmm_window *window)
{
    if (!window)
        return;
    struct registers *r = registers_of(window);
    for (uint32_t i = 0; i < r->num_banks; i++)
        free(r->row[i]);
    free(r->value);
    free(r->writable);
    free(r->flags);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

enum copy_kind { COPY_LOAD, COPY_STORE, COPY_SET };

static int copy(struct vmm_window *window, uint32_t row, uint32_t offset, uint8_t *data,
                uint32_t size, enum copy_kind kind)
{
    struct registers *r = registers_of(window);
    int err = 0;

    if (offset > window->size || size > window->size - offset)
        return -ERANGE;
    pthread_mutex_lock(&r->lock);
    for (uint32_t i = 0; i < size && err == 0; i++) {
        uint8_t *place = place_of(r, row, offset + i);
        if (!place)
            err = -ERANGE;
        else if (kind == COPY_LOAD)
            data[i] = *place;
        else
            *place = kind == COPY_SET ? *place | data[i] : data[i];
    }
    pthread_mutex_unlock(&r->lock);
    return err;
}

int vmm_window_store(struct vmm_window *window, uint32_t row, uint32_t offset, const void *data,
                     uint32_t size)
{
    return copy(window, row, offset, (uint8_t *)data, size, COPY_STORE);
}

int vmm_window_load(struct vmm_window *window, uint32_t row, uint32_t offset, void *data,
                    uint32_t size)
{
    return copy(window, row, offset, data, size, COPY_LOAD);
}

int vmm_window_set_bits(struct vmm_window *window, uint32_t offset, const void *data, uint32_t size)
{
    return copy(window, 0, offset, (uint8_t *)data, size, COPY_SET);
}
