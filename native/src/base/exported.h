/* exported.h - marks the internal functions that libfabula_bench.so calls too, so that one copy of their state serves
 * both libraries. They are in no public header: the two are built and installed together. */
#ifndef FABULA_BASE_EXPORTED_H
#define FABULA_BASE_EXPORTED_H

#define FB_EXPORTED __attribute__((visibility("default")))

#endif
