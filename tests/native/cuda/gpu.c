/* gpu.c - the small model on a real GPU, compared with the CPU. Without a GPU it says so; building it checks
 * that everything links. */
#include "check.h"
#include "model.h"

#include <string.h>

int main(void) {
    static const enum fb_dtype formats[][2] = {
        {FB_F16, FB_F16}, {FB_F32, FB_F32}, {FB_BF16, FB_Q8_0}, {FB_Q8_0, FB_BF16}};
    fb_device *device = NULL;
    const enum fb_status status = fb_device_open(0, 0, &device);
    if (status == FB_DEVICE_FAILED) {
        printf("not run: %s\n", fb_last_error());
        return 0;
    }
    CHECK_AT(status == FB_OK, "%s", fb_last_error());
    struct model *model = model_create(NULL), *on_device = model_create(device);
    CHECK_AT(on_device, "%s", fb_last_error());
    int n_failures = 0;
    for (size_t i = 0; on_device && i < sizeof formats / sizeof *formats; i++)
        n_failures += model_compare(model, on_device, formats[i][0], formats[i][1], 2e-2);
    model_free(on_device);
    model_free(model);
    fb_device_free(device);
    printf("run on a GPU: %d failures\n", n_failures + check_failures);
    return check_result() || n_failures;
}
