/*
 * states.h - the pool of state slots: what recurrent operators remember of a sequence at one position.
 *
 *     slot s    | layer 0 | layer 1 | ... |        each layer a whole number of cache lines of f32
 *
 * The operators define what a layer holds (program/states.c). Slots of a page of the system and more begin on one, so
 * that a slot can be returned to the system.
 */
#ifndef FABULA_KV_STATES_H
#define FABULA_KV_STATES_H

#include "fabula.h"

struct fb_state_layer {
    size_t n_floats;
    size_t offset; /* of its first number in a slot, in floats */
};

struct fb_state_pool {
    struct fb_state_layer *layers; /* [n_layers] */
    int32_t n_layers, n_slots;
    size_t slot_bytes, n_bytes;
    char *memory;
};

/* The numbers of a layer in a slot; NULL for slot -1. */
static inline float *fb_state_at(const struct fb_state_pool *pool, int32_t slot, int32_t layer) {
    if (slot < 0) return NULL;
    return (float *)(void *)(pool->memory + (size_t)slot * pool->slot_bytes) + pool->layers[layer].offset;
}

#endif
