/* cpu.h - which instruction sets this CPU, its operating system and this build offer together. */
#ifndef FABULA_BASE_CPU_H
#define FABULA_BASE_CPU_H

#include "fabula.h"

/* Turns AUTO into the best set. FB_INVALID_ARGUMENT for a value outside the enum, FB_UNSUPPORTED for a set that is
 * missing here. */
enum fb_status fb_isa_resolve(enum fb_isa wanted, enum fb_isa *out);

#endif
