/* gpu.c - the small model on a real GPU, against the CPU. Without one it says so and has tested that everything links. */
#include "check.h"
#include "model.h"

#include <string.h>

int main(void) {
    static const enum fb_dtype formats[][2] = {
        {FB_F16, FB_F16}, {FB_F32, FB_F32}, {FB_BF16, FB_Q8_0}, {FB_Q8_0, FB_BF16}};
    struct model *model = model_create();
    fb_cuda_program *device = NULL;
    int n_failures = 0;
    const enum fb_status status = fb_cuda_program_create(model_program(model), &device);
    if (status == FB_UNSUPPORTED) {
        printf("not run: %s\n", fb_last_error());
    } else {
        CHECK_AT(status == FB_OK, "%s", fb_last_error());
        for (size_t i = 0; status == FB_OK && i < sizeof formats / sizeof *formats; i++)
            n_failures += model_compare(model, device, formats[i][0], formats[i][1], 2e-2);
        fb_cuda_program_free(device);
        printf("run on a GPU: %d failures\n", n_failures + check_failures);
    }
    model_free(model);
    return check_result() || n_failures;
}
