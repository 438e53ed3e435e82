/* A stand-in for libnvidia-ml.so.1, for tests of the NVML probe: the real pynvml loads it.
 *
 * Steered by the environment, read at every call:
 *   FAKE_NVML_COUNT   number of devices (1)
 *   FAKE_NVML_TOTAL   bytes in all, one number a device separated by commas
 *   FAKE_NVML_USED    bytes in use, likewise
 *   FAKE_NVML_BUSY    percent of time busy, likewise
 *   FAKE_NVML_FAIL    "function=code" or "function=code@n": that function returns the error code, from its n-th call on
 *                     (n counts from 1); several separated by commas
 *   FAKE_NVML_LOG     file to which the names of nvmlInit... and nvmlShutdown are appended when they succeed
 * Device i is called "Fake i" and has the identifier "GPU-<i repeated>-fake", a MIG slice is "MIG-<i>-fake".
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int nvmlReturn_t;
typedef struct device {
    int index;
} *nvmlDevice_t;
typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;
typedef struct {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;
typedef struct {
    unsigned int gpu, memory;
} nvmlUtilization_t;

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { MAX_DEVICES = 16, MAX_COUNTED = 16 };

static struct device devices[MAX_DEVICES];
static int initialised = 0;

/* The error a call must return now, or SUCCESS. */
static nvmlReturn_t planned(const char *function)
{
    static struct {
        const char *function;
        int calls;
    } counted[MAX_COUNTED];
    int calls = 0;
    for (int i = 0; i < MAX_COUNTED; i++) {
        if (counted[i].function == NULL)
            counted[i].function = function;
        if (strcmp(counted[i].function, function) == 0) {
            calls = ++counted[i].calls;
            break;
        }
    }
    const char *plan = getenv("FAKE_NVML_FAIL");
    size_t length = strlen(function);
    while (plan != NULL && *plan) {
        if (strncmp(plan, function, length) == 0 && plan[length] == '=') {
            int code = 0, from = 1;
            sscanf(plan + length + 1, "%d@%d", &code, &from);
            if (calls >= from)
                return code;
        }
        plan = strchr(plan, ',');
        plan = plan == NULL ? NULL : plan + 1;
    }
    return SUCCESS;
}

/* The index-th of the comma-separated numbers of an environment variable. */
static unsigned long long setting(const char *name, int index, unsigned long long otherwise)
{
    const char *text = getenv(name);
    for (int i = 0; text != NULL && i < index; i++) {
        text = strchr(text, ',');
        text = text == NULL ? NULL : text + 1;
    }
    return text == NULL || !*text ? otherwise : strtoull(text, NULL, 10);
}

static int count(void)
{
    return (int)setting("FAKE_NVML_COUNT", 0, 1);
}

static void note(const char *what)
{
    const char *path = getenv("FAKE_NVML_LOG");
    FILE *file = path == NULL ? NULL : fopen(path, "a");
    if (file != NULL) {
        fprintf(file, "%s\n", what);
        fclose(file);
    }
}

/* Every call but nvmlInit and nvmlErrorString begins so. */
#define BEGIN                                          \
    do {                                               \
        nvmlReturn_t error = planned(__func__);        \
        if (error != SUCCESS)                          \
            return error;                              \
        if (initialised == 0)                          \
            return UNINITIALIZED;                      \
    } while (0)

static nvmlReturn_t init(const char *function)
{
    nvmlReturn_t error = planned(function);
    if (error != SUCCESS)
        return error;
    for (int i = 0; i < MAX_DEVICES; i++)
        devices[i].index = i;
    initialised++;
    note(function);
    return SUCCESS;
}

nvmlReturn_t nvmlInit_v2(void)
{
    return init(__func__);
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    return init(__func__);
}

nvmlReturn_t nvmlShutdown(void)
{
    BEGIN;
    initialised--;
    note(__func__);
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t result)
{
    static char text[32];
    snprintf(text, sizeof text, "fake error %d", result);
    return text;
}

nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *found)
{
    BEGIN;
    *found = (unsigned int)count();
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    BEGIN;
    if (index >= (unsigned int)count())
        return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

static void identifier(char *text, size_t size, const char *kind, int index)
{
    if (strcmp(kind, "GPU") == 0)
        snprintf(text, size, "GPU-%d%d%d%d-fake", index, index, index, index);
    else
        snprintf(text, size, "MIG-%d-fake", index);
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    BEGIN;
    for (int i = 0; i < count(); i++) {
        char gpu[64], mig[64];
        identifier(gpu, sizeof gpu, "GPU", i);
        identifier(mig, sizeof mig, "MIG", i);
        if (strcmp(uuid, gpu) == 0 || strcmp(uuid, mig) == 0) {
            *device = &devices[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    BEGIN;
    memory->total = setting("FAKE_NVML_TOTAL", device->index, 80ULL << 30);
    memory->used = setting("FAKE_NVML_USED", device->index, 0);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    BEGIN;
    memory->total = setting("FAKE_NVML_TOTAL", device->index, 80ULL << 30);
    memory->used = setting("FAKE_NVML_USED", device->index, 0);
    memory->reserved = 0;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization)
{
    BEGIN;
    utilization->gpu = (unsigned int)setting("FAKE_NVML_BUSY", device->index, 0);
    utilization->memory = 0;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length)
{
    BEGIN;
    return snprintf(name, length, "Fake %d", device->index) >= (int)length ? INSUFFICIENT_SIZE : SUCCESS;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length)
{
    BEGIN;
    if (length < 64)
        return INSUFFICIENT_SIZE;
    identifier(uuid, length, "GPU", device->index);
    return SUCCESS;
}
