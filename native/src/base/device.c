/* device.c - device handles and their memory accounting. See device.h. */
#include "base/device.h"

#include "base/status.h"

#include <stdlib.h>

static enum fb_status find_kind(const struct fb_device_kind **out) {
    *out = fb_device_kind_of_build();
    return *out ? FB_OK : fb_fail(FB_UNSUPPORTED, "this build of Fabula has no CUDA: it was built without FABULA_CUDA");
}

static enum fb_status check_index(const struct fb_device_kind *kind, int32_t index) {
    int32_t n;
    FB_TRY(kind->count(&n));
    FB_REQUIRE(index >= 0 && index < n, "there is no device %d: this machine has %d, numbered from 0", index, n);
    return FB_OK;
}

enum fb_status fb_device_count(int32_t *n_devices) {
    const struct fb_device_kind *kind;
    FB_REQUIRE(n_devices, "n_devices is null");
    FB_TRY(find_kind(&kind));
    return kind->count(n_devices);
}

enum fb_status fb_device_describe(int32_t index, struct fb_device_info *out) {
    const struct fb_device_kind *kind;
    FB_REQUIRE(out, "out is null");
    FB_TRY(find_kind(&kind));
    FB_TRY(check_index(kind, index));
    struct fb_device_info info = {.struct_size = sizeof info};
    FB_TRY(kind->describe(index, &info));
    *out = info;
    return FB_OK;
}

enum fb_status fb_device_open(int32_t index, size_t memory_budget, fb_device **out) {
    const struct fb_device_kind *kind;
    FB_REQUIRE(out, "out is null");
    FB_TRY(find_kind(&kind));
    FB_TRY(check_index(kind, index));
    FB_TRY(kind->check(index));
    struct fb_device *device = calloc(1, sizeof *device);
    if (!device) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a device's handle");
    device->kind = kind;
    device->index = index;
    device->budget = memory_budget;
    atomic_init(&device->used, 0);
    atomic_init(&device->n_references, 1);
    *out = device;
    return FB_OK;
}

static enum fb_status check_members(fb_device *const *devices, int32_t n) {
    FB_REQUIRE(n >= 2 && n <= FB_MOST_MEMBERS, "a group has %d devices, must have 2 .. %d", n, (int)FB_MOST_MEMBERS);
    for (int32_t i = 0; i < n; i++) {
        FB_REQUIRE(devices[i] && devices[i]->n_members == 0, "member %d of a group is null or a group itself", i);
        for (int32_t j = 0; j < i; j++)
            FB_REQUIRE(devices[i]->index != devices[j]->index, "device %d is in the group twice", devices[i]->index);
    }
    return FB_OK;
}

enum fb_status fb_device_join(fb_device *const *devices, int32_t n_devices, fb_device **out) {
    int32_t indices[FB_MOST_MEMBERS];
    FB_REQUIRE(devices && out, "devices or out is null");
    FB_TRY(check_members(devices, n_devices));
    struct fb_device *group = calloc(1, sizeof *group);
    if (!group) return fb_fail(FB_OUT_OF_MEMORY, "no memory for a group's handle");
    group->kind = devices[0]->kind;
    group->index = devices[0]->index;
    atomic_init(&group->used, 0);
    atomic_init(&group->n_references, 1);
    for (int32_t i = 0; i < n_devices; i++)
        indices[i] = devices[i]->index;
    const enum fb_status status = group->kind->group_open(indices, n_devices, &group->links);
    if (status != FB_OK) {
        free(group);
        return status;
    }
    group->n_members = n_devices;
    for (int32_t i = 0; i < n_devices; i++) {
        group->members[i] = devices[i];
        fb_device_retain(devices[i]);
    }
    *out = group;
    return FB_OK;
}

void fb_device_retain(fb_device *device) {
    atomic_fetch_add(&device->n_references, 1);
}

void fb_device_drop(fb_device *device) {
    if (atomic_fetch_sub(&device->n_references, 1) > 1) return;
    if (device->n_members) device->kind->group_close(device->links);
    for (int32_t i = 0; i < device->n_members; i++)
        fb_device_drop(device->members[i]);
    free(device->products);
    free(device);
}

void fb_device_free(fb_device *device) {
    if (device) fb_device_drop(device);
}

/* used: sum over the members. free: what can still be allocated if every member allocates as much as the
 * fullest one can. */
static enum fb_status memory_of_group(const fb_device *group, size_t *used_bytes, size_t *free_bytes) {
    size_t used = 0, least = SIZE_MAX;
    for (int32_t i = 0; i < group->n_members; i++) {
        size_t used_here, free_here;
        FB_TRY(fb_device_memory(group->members[i], &used_here, &free_here));
        used += used_here;
        least = free_here < least ? free_here : least;
    }
    *used_bytes = used;
    *free_bytes = least * (size_t)group->n_members;
    return FB_OK;
}

enum fb_status fb_device_use_library(fb_device *device, const char *path) {
    FB_REQUIRE(device && device->n_members == 0, "device is null or a group; call this for each member instead");
    FB_REQUIRE(!device->products, "the device already uses a library");
    return device->kind->load_products(device->index, path, &device->products);
}

enum fb_status fb_device_memory(const fb_device *device, size_t *used_bytes, size_t *free_bytes) {
    FB_REQUIRE(device && used_bytes && free_bytes, "device, used_bytes or free_bytes is null");
    if (device->n_members) return memory_of_group(device, used_bytes, free_bytes);
    struct fb_device_info info;
    FB_TRY(device->kind->describe(device->index, &info));
    const size_t used = atomic_load(&device->used);
    const size_t left = used < device->budget ? device->budget - used : 0;
    *used_bytes = used;
    *free_bytes = device->budget && left < info.free_bytes ? left : info.free_bytes;
    return FB_OK;
}

static enum fb_status refuse(const fb_device *device, const char *what, size_t n_bytes) {
    const double mib = 1024.0 * 1024.0;
    size_t used, left;
    FB_TRY(fb_device_memory(device, &used, &left));
    return fb_fail(FB_DEVICE_MEMORY, "device %d has no memory for %s: it needs %.1f MiB, %.1f MiB are free%s",
        device->index, what, (double)n_bytes / mib, (double)left / mib, device->budget ? " of its budget" : "");
}

enum fb_status fb_device_allocate(fb_device *device, const char *what, size_t n_bytes, void **out) {
    void *memory = NULL;
    FB_REQUIRE(device->n_members == 0, "%s must lie on one device, not on a group of %d", what, device->n_members);
    if (n_bytes > 0) {
        const size_t before = atomic_fetch_add(&device->used, n_bytes);
        const bool fits = !device->budget || (before <= device->budget && n_bytes <= device->budget - before);
        const enum fb_status status = fits ? device->kind->allocate(device->index, n_bytes, &memory) : FB_DEVICE_MEMORY;
        if (status != FB_OK) {
            atomic_fetch_sub(&device->used, n_bytes);
            return status == FB_DEVICE_MEMORY ? refuse(device, what, n_bytes) : status;
        }
        fb_device_retain(device);
    }
    *out = memory;
    return FB_OK;
}

void fb_device_release(fb_device *device, void *memory, size_t n_bytes) {
    if (!memory) return;
    device->kind->release(device->index, memory);
    atomic_fetch_sub(&device->used, n_bytes);
    fb_device_drop(device);
}
