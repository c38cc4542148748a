// The calls of libcuda.so.1 on the machine of host_driver.h: those that the device layer, PyCUDA and cuda.bindings make.

#include "host_driver.h"

extern "C" {

// Devices and contexts -----------------------------------------------------------------------------------------------------------------------
int cuInit(unsigned flags) {
    if (flags || (world.process && world.process != getpid())) return flags ? INVALID_VALUE : NOT_INITIALIZED;
    if (!devices()) return NO_DEVICE;
    world.process = getpid();
    return OK;
}
int cuDriverGetVersion(int *version) { *version = 13000; return OK; }
int cuDeviceGetCount(int *count) { BEGIN(false); *count = devices(); return OK; }
int cuDeviceGet(int *device, int ordinal) { BEGIN(false); *device = ordinal; return ordinal < devices() ? OK : INVALID_DEVICE; }
int cuDeviceGetName(char *name, int length, int) { BEGIN(false); snprintf(name, (size_t)length, "Double"); return OK; }
int cuDeviceTotalMem_v2(size_t *bytes, int) { BEGIN(false); *bytes = TOTAL; return OK; }
int cuDeviceComputeCapability(int *major, int *minor, int) { BEGIN(false); *major = 9; *minor = 0; return OK; }
int cuDeviceGetAttribute(int *value, int attribute, int) { BEGIN(false); *value = attribute == 75 ? 9 : 0; return OK; }
int cuDevicePrimaryCtxRetain(Context **context, int device) {
    BEGIN(false);
    *context = &world.primary[device];
    if (!(*context)->retained++) world.streams.insert((*context)->null = new Stream{*context, true, false, {}, nullptr});
    return OK;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    BEGIN(false);
    MUST(world.primary[device].retained, INVALID_CONTEXT, "released more often than retained");
    if (!--world.primary[device].retained) fprintf(stderr, "context %d released\n", device);
    return OK;
}
int cuCtxDetach(Context *) { BEGIN(); return fault(INVALID_CONTEXT, "a primary context is released, not detached"); }
int cuCtxPushCurrent_v2(Context *context) {
    BEGIN(false);
    MUST(context->retained, INVALID_CONTEXT, "a context that was released");
    stack.push_back(context);
    return OK;
}
int cuCtxPopCurrent_v2(Context **context) {
    BEGIN();
    if (context) *context = stack.back();
    stack.pop_back();
    return OK;
}
int cuCtxGetCurrent(Context **context) { BEGIN(false); *context = call.context; return OK; }
int cuCtxSynchronize() {
    BEGIN();
    auto all = world.streams;
    for (Stream *one : all) if (one->context == call.context && one->capture) call.status = spoil(one, CAPTURE_UNSUPPORTED);
    for (Stream *one : all) if (one->context == call.context && !call.status) drain(call.lock, one);
    return call.status;
}

// Memory: each piece has pages of its own, which are closed when it is freed and never used again --------------------------------------------
static uintptr_t take(Context *context, size_t size, bool host) {
    size_t whole = (size + 4095) / 4096 * 4096;
    void *base = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(base, 0xff, whole);  // NaN, whatever it is read as
    world.memory[(uintptr_t)base] = {context, size, whole, host};
    return (uintptr_t)base;
}
static int give(Call &call, uintptr_t address, bool host) {
    auto found = world.memory.find(address);
    MUST(found != world.memory.end() && found->second.host == host, INVALID_VALUE, "nothing that was allocated");
    MUST(found->second.context == call.context, INVALID_CONTEXT, "memory of another context");
    for (size_t i = found->second.size; i < found->second.whole; ++i)
        if (((unsigned char *)address)[i] != 0xff) { fault(ILLEGAL_ADDRESS, "memory was written to beyond its end"); break; }
    mmap((void *)address, found->second.whole, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    world.memory.erase(found);
    return OK;
}
int cuMemGetInfo_v2(size_t *free, size_t *all) {
    BEGIN();
    *free = *all = TOTAL;
    for (auto &[address, one] : world.memory) if (!one.host && one.context == call.context) *free -= one.size;
    return OK;
}
int cuMemAlloc_v2(uintptr_t *address, size_t size) {
    size_t free, all;
    if (int bad = cuMemGetInfo_v2(&free, &all)) return bad;
    BEGIN(true, true);
    MUST(size, INVALID_VALUE, "no bytes");
    if (size > free) return OUT_OF_MEMORY;
    *address = take(call.context, size, false);
    return OK;
}
int cuMemFree_v2(uintptr_t address) { BEGIN(true, true); return give(call, address, false); }
int cuMemHostAlloc(void **address, size_t size, unsigned) { BEGIN(true, true); *address = (void *)take(call.context, size, true); return OK; }
int cuMemFreeHost(void *address) { BEGIN(true, true); return give(call, (uintptr_t)address, true); }

// from, to: whether that end is on the host. Pageable memory is read before the call returns, pinned memory when the copy's turn comes.
static int copy(const char *name, uintptr_t target, uintptr_t source, size_t size, Stream *stream, bool from, bool to) {
    Call call(name);
    if (call.status) return call.status;
    USABLE(stream);
    Context *context = call.context;
    bool source_held = holds(source, size, from, context), target_held = holds(target, size, to, context);
    MUST(size && (from || source_held) && (to || target_held), INVALID_VALUE, "not all of it lies on the device");
    if (stream->capture && !(source_held && target_held)) return spoil(stream, CAPTURE_UNSUPPORTED);
    std::vector<char> kept;
    if (!source_held) kept.assign((char *)source, (char *)source + size);
    return put(stream, [=, kept = std::move(kept)] {
        if (source_held) still(source, size, from, context, name);
        if (target_held) still(target, size, to, context, name);
        memmove((void *)target, source_held ? (void *)source : kept.data(), size);
    });
}
int cuMemcpyHtoDAsync_v2(uintptr_t target, void *source, size_t size, Stream *stream) {
    return copy(__func__, target, (uintptr_t)source, size, stream, true, false);
}
int cuMemcpyDtoHAsync_v2(void *target, uintptr_t source, size_t size, Stream *stream) {
    return copy(__func__, (uintptr_t)target, source, size, stream, false, true);
}
int cuMemcpyDtoDAsync_v2(uintptr_t target, uintptr_t source, size_t size, Stream *stream) {
    return copy(__func__, target, source, size, stream, false, false);
}
int cuMemsetD8Async(uintptr_t target, unsigned char value, size_t size, Stream *stream) {
    BEGIN(); USABLE(stream);
    Context *context = call.context;
    MUST(size && holds(target, size, false, context), INVALID_VALUE, "not all of it lies on the device");
    return put(stream, [=] {
        still(target, size, false, context, "a memset");
        memset((void *)target, value, size);
    });
}
int cuMemsetD8_v2(uintptr_t target, unsigned char value, size_t size) { return cuMemsetD8Async(target, value, size, nullptr); }

// Streams and events -------------------------------------------------------------------------------------------------------------------------
int cuStreamCreate(Stream **stream, unsigned flags) {
    BEGIN();
    MUST(flags == 1, INVALID_VALUE, "a stream that waits for the default one stalls when another library uses that");
    world.streams.insert(*stream = new Stream{call.context, true, false, {}, nullptr});
    return OK;
}
int cuStreamDestroy_v2(Stream *stream) {
    BEGIN(); USABLE(stream);
    MUST(!stream->capture, CAPTURE_UNSUPPORTED, "a stream in capture");
    drain(call.lock, stream);
    stream->live = false;
    return OK;
}
int cuStreamSynchronize(Stream *stream) {
    BEGIN(true, true); USABLE(stream);
    if (stream->capture) return spoil(stream, CAPTURE_UNSUPPORTED);
    drain(call.lock, stream);
    return OK;
}
int cuStreamWaitEvent(Stream *stream, Event *event, unsigned) {
    BEGIN(); USABLE(stream); USABLE(world.events, event);
    if (event->captured != stream->capture) return spoil(stream, CAPTURE_ISOLATION);
    if (stream->capture || !event->marker) return OK;
    return put(stream, [marker = event->marker] {
        Lock lock(world.mutex);
        drain(lock, marker->stream, marker.get());
    });
}
int cuEventCreate(Event **event, unsigned) { BEGIN(); world.events.insert(*event = new Event{call.context, true, nullptr, nullptr}); return OK; }
int cuEventDestroy_v2(Event *event) { BEGIN(); USABLE(world.events, event); event->live = false; return OK; }
int cuEventRecord(Event *event, Stream *stream) {
    BEGIN(); USABLE(stream); USABLE(world.events, event);
    event->captured = stream->capture;
    if (stream->capture) return OK;
    event->marker = std::make_shared<Marker>(Marker{stream, false});
    return put(stream, [marker = event->marker] { marker->passed = true; });
}
int cuEventSynchronize(Event *event) {
    BEGIN(true, true); USABLE(world.events, event);
    if (event->captured) return CAPTURED_EVENT;
    if (auto marker = event->marker) drain(call.lock, marker->stream, marker.get());
    return OK;
}
int cuEventQuery(Event *event) {
    BEGIN(true, true); USABLE(world.events, event);
    if (event->captured) return CAPTURED_EVENT;
    auto marker = event->marker;
    if (!marker || marker->passed) return OK;
    if (!marker->stream->busy) step(call.lock, marker->stream);  // who asks again and again sees it pass
    return NOT_READY;
}
int cuEventElapsedTime_v2(float *milliseconds, Event *from, Event *to) {
    BEGIN();
    for (Event *event : {from, to}) {
        USABLE(world.events, event);
        MUST(event->marker && event->marker->passed, NOT_READY, "an event that has not passed");
    }
    *milliseconds = 1;
    return OK;
}

// Kernels and host functions -----------------------------------------------------------------------------------------------------------------
int cuModuleLoadDataEx(Module **module, const void *image, unsigned, int *, void **) {
    BEGIN(true, true);
    MUST(!memcmp(image, "\177ELF", 4), INVALID_IMAGE, "not a cubin");
    world.modules.insert(*module = new Module{call.context, true});
    return OK;
}
int cuModuleUnload(Module *module) { BEGIN(true, true); USABLE(world.modules, module); module->live = false; return OK; }
int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    BEGIN(); USABLE(world.modules, module);
    for (const Kernel &one : kernels) if (one.name == name) { *function = new Function{module, &one}; return OK; }
    return NOT_FOUND;
}
int cuFuncSetBlockShape(Function *function, int, int, int) { BEGIN(); USABLE(world.modules, function->module); return OK; }
int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   Stream *stream, void **, void **extra) {
    BEGIN(); USABLE(world.modules, function->module); USABLE(stream);
    MUST(gx && gy && gy < 65536 && gz == 1 && bx && bx <= 1024 && by == 1 && bz == 1 && !shared, INVALID_VALUE, "its grid or block");
    MUST(extra && extra[0] == (void *)1 && extra[2] == (void *)2, INVALID_VALUE, "arguments that are not in one buffer, as PyCUDA packs them");
    std::vector<char> packed((char *)extra[1], (char *)extra[1] + *(size_t *)extra[3]);
    const Kernel &kernel = *function->kernel;
    std::vector<size_t> offsets;
    size_t end = 0;
    for (size_t size : kernel.sizes) offsets.push_back((end + size - 1) / size * size), end = offsets.back() + size;
    MUST(end == packed.size(), INVALID_VALUE, kernel.name + " is given arguments of another size");
    return put(stream, [=, &kernel, context = call.context]() mutable {
        std::vector<void *> arguments;
        for (size_t i = 0; i < offsets.size(); ++i) {
            arguments.push_back(&packed[offsets[i]]);
            uintptr_t address = kernel.pointers[i] ? *(uintptr_t *)arguments[i] : 0;
            if (address) still(address, 1, false, context, kernel.name);
        }
        Lock lock(world.kernel_mutex);
        kernel.launch(gx, gy, bx, arguments.data());
    });
}
int cuLaunchHostFunc(Stream *stream, void (*function)(void *), void *data) {
    BEGIN(); USABLE(stream);
    return put(stream, [=] {
        in_host_function = true;
        function(data);
        in_host_function = false;
    });
}

// Graphs -------------------------------------------------------------------------------------------------------------------------------------
int cuStreamBeginCapture_v2(Stream *stream, int mode) {
    BEGIN();
    MUST(stream, CAPTURE_UNSUPPORTED, "the default stream");
    USABLE(stream);
    MUST(!stream->capture, INVALID_VALUE, "a capture that is begun twice");
    stream->capture.reset(new Graph{call.context, mode, std::this_thread::get_id(), false, 0, {}});
    return OK;
}
int cuStreamEndCapture(Stream *stream, Graph **graph) {
    BEGIN(); USABLE(stream);
    auto captured = std::move(stream->capture);
    *graph = nullptr;
    MUST(captured && captured->thread == std::this_thread::get_id(), INVALID_VALUE, "no capture of this thread");
    if (captured->spoiled) return CAPTURE_INVALIDATED;
    world.graphs.insert(*graph = new Graph(*captured));
    return OK;
}
int cuGraphInstantiateWithFlags(Graph **executable, Graph *graph, unsigned long long flags) {
    BEGIN(true, true);
    MUST(world.graphs.count(graph) && !flags, INVALID_VALUE, "not a graph");
    world.executables.insert(*executable = new Graph(*graph));
    return OK;
}
int cuGraphDestroy(Graph *graph) { BEGIN(false); MUST(world.graphs.erase(graph), INVALID_VALUE, "not a graph"); return OK; }
int cuGraphExecDestroy(Graph *graph) {
    BEGIN(false);
    MUST(world.executables.count(graph) && !graph->queued, INVALID_VALUE, "not a graph that can go");
    world.executables.erase(graph);
    return OK;
}
int cuGraphLaunch(Graph *graph, Stream *stream) {
    BEGIN(); USABLE(stream);
    MUST(world.executables.count(graph) && graph->context == call.context, INVALID_VALUE, "not a graph of this context");
    ++graph->queued;
    return put(stream, [graph] {
        for (Op &op : graph->ops) op();
        Lock lock(world.mutex);
        --graph->queued;
    });
}

// Words, and where functions are found -------------------------------------------------------------------------------------------------------
int cuGetErrorString(int status, const char **text) {
    static const std::map<int, const char *> words = {
        {NOT_INITIALIZED, "initialization error"}, {OUT_OF_MEMORY, "out of memory"}, {NO_DEVICE, "no CUDA-capable device is detected"},
        {CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"},
        {CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"}};
    *text = words.count(status) ? words.at(status) : "see the line FAULT";
    return OK;
}
int cuGetExportTable(const void **, const void *) { return NOT_FOUND; }  // NVRTC asks for one
int cuGetProcAddress_v2(const char *symbol, void **function, int, unsigned long long, int *) {
    Dl_info here;
    dladdr((void *)cuInit, &here);
    void *library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    std::string name = symbol;
    *function = dlsym(library, (name + "_v2").c_str());
    if (!*function) *function = dlsym(library, name == "cuGraphInstantiate" ? "cuGraphInstantiateWithFlags" : symbol);
    return *function ? OK : NOT_FOUND;
}
}

__attribute__((destructor)) static void at_exit() {
    size_t pieces = world.memory.size(), graphs = world.graphs.size() + world.executables.size();
    if (world.process == getpid() && pieces + graphs) fprintf(stderr, "left at the end: %zu pieces of memory, %zu graphs\n", pieces, graphs);
}
