// A GPU's driver in host memory, for machines without a GPU: its contexts, memory, streams, events and graphs, and the rules for them.
//
// Queued work runs only when somebody waits for it, so that a missing wait gives wrong numbers. Every rule of CUDA's documentation that the
// layer could break is held to: what is not permitted within a capture returns its error, and what a real driver may let pass unseen (memory
// used after it was freed, a handle of another context) is a line "FAULT" on stderr. HOST_DEVICES: how many GPUs there are.

#include <sys/mman.h>
#include <unistd.h>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <dlfcn.h>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>
#include "kernels.cpp"  // kernels.cu for the host, and KERNELS, which names them

enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600, ILLEGAL_ADDRESS = 700, NOT_PERMITTED = 800,
    CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907
};
enum { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };  // modes of capture

typedef std::function<void()> Op;
typedef std::unique_lock<std::mutex> Lock;
struct Stream;
struct Context { int retained; Stream *null; };
struct Graph { Context *context; int mode; std::thread::id thread; bool spoiled; int queued; std::vector<Op> ops; };
struct Stream { Context *context; bool live, busy; std::deque<Op> queue; std::shared_ptr<Graph> capture; };
struct Marker { Stream *stream; bool passed; };
struct Event { Context *context; bool live; std::shared_ptr<Marker> marker; std::shared_ptr<Graph> captured; };
struct Memory { Context *context; size_t size, whole; bool host; };
typedef void (*Launch)(unsigned, unsigned, unsigned, void **);
struct Kernel { std::string name; Launch launch; std::vector<size_t> sizes; std::vector<bool> pointers; };  // of its arguments
struct Module { Context *context; bool live; };
struct Function { Module *module; const Kernel *kernel; };

// All of it stays until the very end of the process, when Python's modules still call.
static struct World {
    std::mutex mutex, kernel_mutex;
    std::condition_variable changed;
    pid_t process = 0;
    std::map<int, Context> primary;
    std::map<uintptr_t, Memory> memory;
    std::set<Stream *> streams;
    std::set<Event *> events;
    std::set<Module *> modules;
    std::set<Graph *> graphs, executables;
} &world = *new World;
static thread_local const char *calling = "";
static thread_local bool in_host_function = false;
static thread_local std::vector<Context *> stack;

static int fault(int status, const std::string &what) { fprintf(stderr, "FAULT %s: %s\n", calling, what.c_str()); return status; }
static int devices() { const char *text = getenv("HOST_DEVICES"); return text ? atoi(text) : 1; }
static const size_t TOTAL = 1 << 30;  // bytes of each GPU

template <class... A>
static Kernel described(const char *name, void (*)(A...), Launch launch) {
    return {name, launch, {sizeof(A)...}, {std::is_pointer<A>::value...}};
}
#define KERNEL(name) described(#name, name, launch_##name),
static const std::vector<Kernel> &kernels = *new std::vector<Kernel>{KERNELS};

// What every call begins with: it holds the lock, and `status` says what stands in the way. unsafe: not for a thread that captures.
struct Call {
    Lock lock{world.mutex};
    int status = OK;
    Context *context = stack.empty() ? nullptr : stack.back();
    explicit Call(const char *name, bool in_context = true, bool unsafe = false) {
        calling = name;
        if (world.process != getpid()) status = NOT_INITIALIZED;  // no cuInit here; or a child that was forked off
        else if (in_host_function) status = fault(NOT_PERMITTED, "within a host function");
        else if (in_context && (!context || !context->retained)) status = fault(INVALID_CONTEXT, "no live context is current");
        for (Stream *one : world.streams) {
            Graph *graph = one->capture.get();
            if (status || !unsafe || !graph || graph->mode == RELAXED) continue;
            if (graph->mode == THREAD_LOCAL && graph->thread != std::this_thread::get_id()) continue;
            graph->spoiled = true;
            status = CAPTURE_UNSUPPORTED;
        }
    }
};
#define BEGIN(...) Call call(__func__, ##__VA_ARGS__); if (call.status) return call.status
#define MUST(wanted, status, what) if (!(wanted)) return fault(status, what)

static bool holds(uintptr_t address, size_t size, bool host, Context *context) {
    auto next = world.memory.upper_bound(address);
    if (next == world.memory.begin()) return false;
    auto &[base, one] = *--next;
    return one.host == host && address + size <= base + one.size && (host || one.context == context);
}
static void still(uintptr_t address, size_t size, bool host, Context *context, const std::string &who) {
    Lock lock(world.mutex);
    if (!holds(address, size, host, context)) fault(ILLEGAL_ADDRESS, who + " comes to memory that is there no more");
}

// Run the first thing that lies in a stream. The lock is let go of meanwhile: Python's functions may run, and other threads call.
static void step(Lock &lock, Stream *stream) {
    Op op = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->busy = true;
    lock.unlock();
    op();
    lock.lock();
    stream->busy = false;
    world.changed.notify_all();
}
// Run what lies in a stream, or as far as a marker.
static void drain(Lock &lock, Stream *stream, Marker *until = nullptr) {
    while (until ? !until->passed : stream->busy || !stream->queue.empty()) {
        if (stream->busy) world.changed.wait(lock);
        else step(lock, stream);
    }
}
static int put(Stream *stream, Op op) {
    Graph *graph = stream->capture.get();
    if (graph && graph->spoiled) return CAPTURE_INVALIDATED;
    if (graph) graph->ops.push_back(std::move(op));
    else stream->queue.push_back(std::move(op));
    return OK;
}
static int spoil(Stream *stream, int status) { if (stream->capture) stream->capture->spoiled = true; return status; }

template <class T>
static int usable(Call &call, std::set<T *> &all, T *one) {
    MUST(all.count(one) && one->live, INVALID_HANDLE, "a handle that is not alive");
    MUST(one->context == call.context, INVALID_CONTEXT, "a handle of another context");
    return OK;
}
static int usable(Call &call, Stream *&stream) { if (!stream) stream = call.context->null; return usable(call, world.streams, stream); }
#define USABLE(...) if (int bad = usable(call, __VA_ARGS__)) return bad
