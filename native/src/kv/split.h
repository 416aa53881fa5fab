/*
 * split.h - a page pool split over the members of a group by KV heads.
 *
 * Each member has a pool with the same number of pages, numbered alike, that holds the member's heads.
 * Reading and writing a page uses the layout of an unsplit pool:
 *
 *     a whole page     [n_layers][n_kv_heads] slabs
 *     a member's page  [n_layers][heads first .. first + n - 1]
 *
 * With fewer heads than members, neighbors hold copies of the same head and compute the same bits for it.
 */
#ifndef FABULA_KV_SPLIT_H
#define FABULA_KV_SPLIT_H

#include "kv/pages.h"

/* KV heads of a member: n heads starting at `first`. FB_INVALID_ARGUMENT unless one number divides
 * the other. */
enum fb_status fb_split_heads(int32_t n_kv_heads, int32_t n_members, int32_t member, int32_t *first, int32_t *n);

/* Creates the members' pools; `pool` has everything except its memory. */
enum fb_status fb_split_create(struct fb_page_pool *pool);
void fb_split_free(struct fb_page_pool *pool);

/* The fb_page_* functions on a split pool, for checked arguments. After a failure some members' parts of the
 * page may have changed. */
enum fb_status fb_split_copy(const struct fb_page_pool *pool, int32_t dst, int32_t src);
enum fb_status fb_split_zero(const struct fb_page_pool *pool, int32_t page);
enum fb_status fb_split_read(const struct fb_page_pool *pool, int32_t page, char *dst);
enum fb_status fb_split_write(const struct fb_page_pool *pool, int32_t page, const char *src);

#endif
