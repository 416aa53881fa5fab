/* tiles.c - see tiles.h. The conditions are those of Intel's manual, volume 2, for LDTILECFG, TILELOADD,
 * TILESTORED and TDPBSSD. */
#include "emulated/tiles.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TILES = 8, NAMES = 16, ROWS = 16, ROW_BYTES = 64 };

static _Thread_local struct {
    struct fb_tile_shapes shapes;
    uint8_t data[TILES][ROWS][ROW_BYTES];
    size_t n_dots;
} state;

static void require(bool condition, const char *what) {
    if (condition) return;
    fprintf(stderr, "emulated tiles: %s\n", what);
    abort();
}

static void require_shape(int tile) {
    require(state.shapes.palette == 1, "used before they were configured");
    require(tile >= 0 && tile < TILES && state.shapes.n_rows[tile] > 0, "one without a shape was used");
}

void fb_tile_configure(const struct fb_tile_shapes *shapes) {
    static const uint8_t zeros[sizeof shapes->reserved];
    require(shapes->palette == 1, "palette is not 1");
    require(shapes->start_row == 0 && memcmp(shapes->reserved, zeros, sizeof zeros) == 0, "reserved bytes are not 0");
    for (int i = 0; i < NAMES; i++) {
        require(shapes->n_rows[i] <= (i < TILES ? ROWS : 0), "too many rows");
        require(shapes->row_bytes[i] <= (i < TILES ? ROW_BYTES : 0), "too many bytes in a row");
        require((shapes->n_rows[i] == 0) == (shapes->row_bytes[i] == 0), "rows without bytes, or bytes without rows");
    }
    state.shapes = *shapes;
    memset(state.data, 0, sizeof state.data);
}

void fb_tile_release(void) {
    memset(&state.shapes, 0, sizeof state.shapes);
    memset(state.data, 0xEE, sizeof state.data);
}

void fb_tile_zero(int tile) {
    require_shape(tile);
    memset(state.data[tile], 0, sizeof state.data[tile]);
}

void fb_tile_load(int tile, const void *from, size_t stride) {
    fb_tile_zero(tile);
    for (int m = 0; m < state.shapes.n_rows[tile]; m++)
        memcpy(state.data[tile][m], (const char *)from + (size_t)m * stride, state.shapes.row_bytes[tile]);
}

void fb_tile_store(int tile, void *to, size_t stride) {
    require_shape(tile);
    for (int m = 0; m < state.shapes.n_rows[tile]; m++)
        memcpy((char *)to + (size_t)m * stride, state.data[tile][m], state.shapes.row_bytes[tile]);
}

void fb_tile_dot(int sums, int a, int b) {
    require_shape(sums);
    require_shape(a);
    require_shape(b);
    const uint8_t *rows = state.shapes.n_rows;
    const uint16_t *bytes = state.shapes.row_bytes;
    require(sums != a && sums != b && a != b, "one is two operands of a product");
    require(bytes[sums] % 4 == 0 && bytes[a] % 4 == 0 && bytes[b] % 4 == 0, "rows are not whole words");
    require(rows[sums] == rows[a] && bytes[sums] == bytes[b] && bytes[a] / 4 == rows[b],
        "shapes of a product do not fit together");
    for (int m = 0; m < rows[sums]; m++)
        for (int n = 0; n < bytes[sums] / 4; n++) {
            int32_t sum;
            memcpy(&sum, &state.data[sums][m][4 * n], sizeof sum);
            for (int k = 0; k < rows[b]; k++)
                for (int i = 0; i < 4; i++)
                    sum += (int8_t)state.data[a][m][4 * k + i] * (int8_t)state.data[b][k][4 * n + i];
            memcpy(&state.data[sums][m][4 * n], &sum, sizeof sum);
        }
    state.n_dots++;
}

bool emulated_tiles_held(void) {
    return state.shapes.palette != 0;
}

size_t emulated_tile_dots(void) {
    return state.n_dots;
}
