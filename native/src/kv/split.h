/*
 * split.h - a pool whose pages are spread over the members of a group by KV heads.
 *
 * Each member has a pool of as many pages, all of them numbered alike, with its own heads. What is read of a page, or written
 * to it, has the layout of a pool that lies in one place:
 *
 *     a page          [n_layers][n_kv_heads] slabs
 *     a member's      [n_layers][heads first .. first + n - 1]
 *
 * Where there are fewer heads than members, neighbours hold the same head, and compute the same bits for it.
 */
#ifndef FABULA_KV_SPLIT_H
#define FABULA_KV_SPLIT_H

#include "kv/pages.h"

/* KV heads of a member: n from `first` on. FB_INVALID_ARGUMENT unless one number divides the other. */
enum fb_status fb_split_heads(int32_t n_kv_heads, int32_t n_members, int32_t member, int32_t *first, int32_t *n);

/* Makes the members' pools; `pool` has everything but its memory. */
enum fb_status fb_split_create(struct fb_page_pool *pool);
void fb_split_free(struct fb_page_pool *pool);

/* As the functions of pages, whose arguments were checked. A failure may leave some members' part of the page changed. */
enum fb_status fb_split_copy(const struct fb_page_pool *pool, int32_t dst, int32_t src);
enum fb_status fb_split_zero(const struct fb_page_pool *pool, int32_t page);
enum fb_status fb_split_read(const struct fb_page_pool *pool, int32_t page, char *dst);
enum fb_status fb_split_write(const struct fb_page_pool *pool, int32_t page, const char *src);

#endif
