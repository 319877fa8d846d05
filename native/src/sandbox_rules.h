/* The rows of the filters: one system call, perhaps on one condition. */
#ifndef SANDBOX_RULES_H
#define SANDBOX_RULES_H

#include "libsandbox.h"
#include <stddef.h>

/* Allowed if (argument & mask) == value; without a condition if mask is 0. */
struct sandbox_rule {
    int nr;
    unsigned arg;
    uint64_t mask, value;
};

struct sandbox_rules {
    const struct sandbox_rule *rule;
    size_t count;
};

extern const struct sandbox_rules rules_of_all;
/* Each class's own; CONTROL gets those of all. */
extern const struct sandbox_rules rules_of_class[SANDBOX_CLASSES];

#endif
