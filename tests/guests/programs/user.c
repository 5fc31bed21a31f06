// user: what a program in user mode can do that is not just computing, each thing again and again: faults and signals, memory
// that changes under it, code that changes, registers that others use meanwhile. Says `TEREM: NAME ok` or `TEREM: FAIL NAME …`;
// what it says is the same on every x86-64 Linux, however its code is executed.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <errno.h>
#include <fenv.h>
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

static void fail(const char *name, const char *what, long a, long b) {
  printf("TEREM: FAIL %s: %s %ld %ld\n", name, what, a, b);
  fflush(stdout);
}
#define CHECK(what, a, b) do { long x_ = (long)(a), y_ = (long)(b); if (x_ != y_) { fail(__func__, what, x_, y_); return; } } while (0)

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

// Computes for a while, so that whoever looks at it takes it for a program that does.
static uint64_t compute(double seconds) {
  uint64_t x = 1;
  for (double end = now() + seconds; now() < end;)
    for (int i = 0; i < 200000; i++) x = x * 6364136223846793005u + 1442695040888963407u;
  return x;
}

static void *pages(size_t n) {
  void *p = mmap(0, n * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? NULL : p;
}

static void handle(int signal, void (*handler)(int, siginfo_t *, void *)) {
  struct sigaction a = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_NODEFER};
  sigaction(signal, &a, NULL);
}

static volatile long count;
static char *volatile region;

static void mend(int s, siginfo_t *info, void *u) {
  (void)s, (void)u;
  count++;
  mprotect((void *)((uintptr_t)info->si_addr & ~4095ul), 4096, PROT_READ | PROT_WRITE);
}

static void faults(void) {
  handle(SIGSEGV, mend);
  region = pages(64);
  for (int round = 0; round < 30; round++) {
    mprotect(region, 64 * 4096, round & 1 ? PROT_NONE : PROT_READ);
    count = 0;
    for (int i = 0; i < 64; i++) region[i * 4096 + round] = (char)(i + round);
    CHECK("faults", count, 64);
    for (int i = 0; i < 64; i++) CHECK("value", region[i * 4096 + round], (char)(i + round));
  }
  // A string instruction that is stopped in the middle, at each page.
  char *from = pages(8);
  memset(from, 7, 8 * 4096);
  for (int round = 0; round < 20; round++) {
    mprotect(region, 8 * 4096, PROT_NONE);
    count = 0;
    void *d = region + 5, *s = from;
    size_t n = 8 * 4096 - 5;
    __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n)::"memory");
    CHECK("pages of a string", count, 8);
    CHECK("end of it", (char *)d - region, 8 * 4096);
    CHECK("its last byte", region[8 * 4096 - 1], 7);
  }
  signal(SIGSEGV, SIG_DFL);
  munmap(region, 64 * 4096);
}

static sigjmp_buf back;
static volatile int seen_code;
static volatile uintptr_t seen_rip;
static void leave(int s, siginfo_t *info, void *u) {
  seen_code = info->si_code;
  seen_rip = (uintptr_t)((ucontext_t *)u)->uc_mcontext.gregs[REG_RIP];
  siglongjmp(back, s);
}

extern char at_ud2[], at_div[], after_int3[], at_null[];
static void exceptions(void) {
  int all[] = {SIGILL, SIGFPE, SIGTRAP, SIGSEGV};
  for (int i = 0; i < 4; i++) handle(all[i], leave);
  volatile int round;
  for (round = 0; round < 50; round++) {
    int s = sigsetjmp(back, 1);
    if (!s) __asm__ volatile("at_ud2: ud2");
    CHECK("ud2", s, SIGILL);
    CHECK("its place", seen_rip, (uintptr_t)at_ud2);
    s = sigsetjmp(back, 1);
    if (!s) __asm__ volatile("xor %%edx, %%edx; xor %%ecx, %%ecx; mov $1, %%eax; at_div: div %%ecx" ::: "eax", "ecx", "edx");
    CHECK("div", s, SIGFPE);
    CHECK("why", seen_code, FPE_INTDIV);
    CHECK("its place", seen_rip, (uintptr_t)at_div);
    s = sigsetjmp(back, 1);
    if (!s) __asm__ volatile("int3; after_int3: nop");
    CHECK("int3", s, SIGTRAP);
    CHECK("its place", seen_rip, (uintptr_t)after_int3);
    s = sigsetjmp(back, 1);
    if (!s) __asm__ volatile("at_null: mov 8, %%rax" ::: "rax");
    CHECK("null", s, SIGSEGV);
    CHECK("its place", seen_rip, (uintptr_t)at_null);
    s = sigsetjmp(back, 1);
    if (!s) __asm__ volatile("mov %0, %%rax; mov (%%rax), %%rax" ::"i"(0x8000000000000000) : "rax");
    CHECK("not canonical", s, SIGSEGV);
    s = sigsetjmp(back, 1);
    if (!s) __asm__ volatile("hlt");
    CHECK("hlt", s, SIGSEGV);
    s = sigsetjmp(back, 1);
    if (!s) {
      feenableexcept(FE_DIVBYZERO);
      volatile double zero = 0, x = 1 / zero;
      (void)x;
    }
    CHECK("SSE exception", s, SIGFPE);
    CHECK("why", seen_code, FPE_FLTDIV);
    fedisableexcept(FE_ALL_EXCEPT);
    feclearexcept(FE_ALL_EXCEPT);
    s = sigsetjmp(back, 1);
    if (!s) {
      uint16_t control = 0x37b; // division by zero unmasked
      __asm__ volatile("fldcw %0; fld1; fldz; fdivrp; fwait" ::"m"(control));
    }
    CHECK("x87 exception", s, SIGFPE);
    __asm__ volatile("fninit");
  }
  for (int i = 0; i < 4; i++) signal(all[i], SIG_DFL);
}

static void stepped(int s, siginfo_t *info, void *u) {
  (void)s, (void)info, (void)u;
  count++;
}

static void steps(void) {
  handle(SIGTRAP, stepped);
  for (int round = 0; round < 20; round++) {
    count = 0;
    __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; nop; nop; xor %%eax, %%eax; cpuid; pushf; andl $~0x100, (%%rsp); popf"
                     ::: "rax", "rbx", "rcx", "rdx", "memory", "cc");
    // nop, nop, xor, cpuid, pushf, and, popf
    CHECK("steps", count, 7);
    // What stops for another reason directly behind the one that sets the flag.
    count = 0;
    __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; cpuid; pushf; andl $~0x100, (%%rsp); popf"
                     ::: "rax", "rbx", "rcx", "rdx", "memory", "cc");
    CHECK("steps from cpuid on", count, 4);
    static volatile char *fresh;
    fresh = pages(1);
    count = 0;
    __asm__ volatile("pushf; orl $0x100, (%%rsp); popf; movb $1, (%0); pushf; andl $~0x100, (%%rsp); popf"
                     ::"r"(fresh) : "memory", "cc");
    CHECK("steps from a page fault on", count, 4);
    munmap((void *)fresh, 4096);
    compute(0.001);
  }
  signal(SIGTRAP, SIG_DFL);
}

static void copies(void) {
  int *shared = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  unsigned char *own = pages(200);
  for (int round = 0; round < 15; round++) {
    for (int i = 0; i < 200; i++) own[i * 4096] = (unsigned char)(i + round);
    pid_t p = fork();
    if (!p) {
      compute(0.002);
      int wrong = 0;
      for (int i = 0; i < 200; i++) wrong += own[i * 4096] != (unsigned char)(i + round);
      for (int i = 0; i < 200; i++) own[i * 4096] = 0;
      for (int i = 0; i < 1000; i++) __atomic_fetch_add(shared, 1, __ATOMIC_SEQ_CST);
      _exit(wrong);
    }
    compute(0.002);
    for (int i = 0; i < 200; i += 2) own[i * 4096 + 1] = 9;
    int status;
    waitpid(p, &status, 0);
    CHECK("in the child", status, 0);
    for (int i = 0; i < 200; i++) CHECK("in the parent", own[i * 4096], (unsigned char)(i + round));
    CHECK("shared", *shared, 1000 * (round + 1));
  }
  munmap(own, 200 * 4096);
}

static atomic_int stop;
static void *drops(void *p) {
  while (!stop) {
    madvise(p, 16 * 4096, MADV_DONTNEED);
    sched_yield();
  }
  return NULL;
}

static void *counts(void *p) {
  for (int i = 0; i < 200000; i++) __atomic_fetch_add((long *)p, 1, __ATOMIC_SEQ_CST);
  return NULL;
}

static void threads(void) {
  pthread_t t[3];
  long *sum = pages(1);
  for (int i = 0; i < 3; i++) pthread_create(&t[i], NULL, counts, sum);
  counts(sum);
  for (int i = 0; i < 3; i++) pthread_join(t[i], NULL);
  CHECK("sum", *sum, 800000);
  // Pages that another thread drops: what is read is what was written, or zero.
  volatile long *p = pages(16);
  stop = 0;
  pthread_create(&t[0], NULL, drops, (void *)p);
  long zeroes = 0;
  for (long i = 1; i < 300000; i++) {
    p[i % 16 * 512] = i;
    long v = p[i % 16 * 512];
    if (v == 0) zeroes++;
    else if (v != i) { fail(__func__, "a dropped page has", v, i); break; }
  }
  stop = 1;
  pthread_join(t[0], NULL);
  (void)zeroes;
}

typedef int (*function)(void);
static void put(unsigned char *at, int value) {
  at[0] = 0xb8; // mov eax, value; ret
  memcpy(at + 1, &value, 4);
  at[5] = 0xc3;
}

static unsigned char *volatile jit_writes;
static function volatile jit_runs;
static atomic_int asked, answered;
static void *rewrites(void *u) {
  (void)u;
  for (int i = 1; i <= 300; i++) {
    while (asked != i) sched_yield();
    put(jit_writes, i * 3);
    answered = i;
  }
  return NULL;
}

static void code(void) {
  unsigned char *both = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  for (int i = 0; i < 300; i++) {
    unsigned char *at = both + (i % 3 == 1 ? 4093 : i % 3 * 50); // across the pages as well
    put(at, i);
    int got = ((function)at)();
    CHECK("written and run", got, i);
    int twice = 0;
    for (int k = 0; k < 50; k++) twice += ((function)at)();
    CHECK("run again", twice, 50 * i);
  }
  // Written at one address, run at another, by one thread and by two.
  int fd = memfd_create("code", 0);
  if (ftruncate(fd, 4096)) fail(__func__, "ftruncate", errno, 0);
  jit_writes = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  jit_runs = (function)mmap(0, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
  for (int i = 0; i < 300; i++) {
    put(jit_writes, i);
    CHECK("written elsewhere", jit_runs(), i);
  }
  pthread_t t;
  asked = answered = 0;
  pthread_create(&t, NULL, rewrites, NULL);
  for (int i = 1; i <= 300; i++) {
    asked = i;
    while (answered != i) sched_yield();
    // Serialise, as the manual demands of who runs what another processor wrote.
    unsigned a, b, c, d;
    __cpuid(0, a, b, c, d);
    CHECK("written by another thread", jit_runs(), i * 3);
  }
  pthread_join(t, NULL);
  close(fd);
}

static void registers(void) {
  unsigned a, b, c, d;
  __cpuid(1, a, b, c, d);
  int avx = c >> 28 & 1;
  uint16_t control = 0x77f, got; // rounding down
  __asm__ volatile("fldcw %0" ::"m"(control));
  _mm_setcsr(0x1f80 | 2 << 13); // rounding up
  struct { _Alignas(32) unsigned char b[32]; } in, out;
  for (int i = 0; i < 32; i++) in.b[i] = (unsigned char)(i * 7 + 1);
  for (int round = 0; round < 200; round++) {
    long r12 = round * 1234567, r13;
    if (avx)
      __asm__ volatile("vmovdqa %2, %%ymm7; mov %3, %%r12; mov $24, %%eax; syscall; mov %%r12, %1; vmovdqa %%ymm7, %0; vzeroupper"
                       : "=m"(out), "=r"(r13) : "m"(in), "r"(r12) : "rax", "rcx", "r11", "r12", "xmm7", "memory");
    else
      __asm__ volatile("movdqa %2, %%xmm7; mov %3, %%r12; mov $24, %%eax; syscall; mov %%r12, %1; movdqa %%xmm7, %0"
                       : "=m"(out), "=r"(r13) : "m"(in), "r"(r12) : "rax", "rcx", "r11", "r12", "xmm7", "memory");
    CHECK("r12", r13, r12);
    CHECK("vector register", memcmp(&in, &out, avx ? 32 : 16), 0);
    if (round % 20 == 0) compute(0.001);
  }
  __asm__ volatile("fnstcw %0" : "=m"(got));
  CHECK("x87 control", got, control);
  CHECK("MXCSR", _mm_getcsr() >> 13 & 3, 2);
  volatile float one = 1, three = 3, third = one / three;
  float value = third;
  int bits;
  memcpy(&bits, &value, 4);
  CHECK("rounded up", bits, 0x3eaaaaab);
  _mm_setcsr(0x1f80);
  __asm__ volatile("fninit");
  unsigned long base = 0;
  syscall(SYS_arch_prctl, ARCH_SET_GS, 0x123456789000);
  for (int round = 0; round < 20; round++) {
    compute(0.0005);
    syscall(SYS_arch_prctl, ARCH_GET_GS, &base);
    CHECK("GS base", base, 0x123456789000);
  }
  syscall(SYS_arch_prctl, ARCH_SET_GS, 0);
}

// Segment registers as hardly any program has them.
static void segments(void) {
  for (int round = 0; round < 5; round++) {
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(1));
    compute(0.01);
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(0x2b));
    compute(0.002);
    __asm__ volatile("mov %0, %%ds; mov %0, %%es" ::"r"(0));
  }
  if (getauxval(AT_HWCAP2) & 2) { // rdgsbase and its like
    unsigned long base = 0xffff812345678000, got;
    for (int round = 0; round < 5; round++) {
      __asm__ volatile("wrgsbase %0" ::"r"(base));
      compute(0.01);
      __asm__ volatile("rdgsbase %0" : "=r"(got));
      CHECK("a kernel's address in GS base", got, base);
    }
    __asm__ volatile("wrgsbase %0" ::"r"(0l));
  }
  // 32-bit code: it touches a page that is not there yet, again and again.
  char *low = mmap(NULL, 64 * 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
  uint32_t data = (uint32_t)(uintptr_t)low + 8 * 4096;
  unsigned char *code32 = (unsigned char *)low;
  memcpy(code32, "\xa1\0\0\0\0\x40\xa3\0\0\0\0\xcb", 12); // mov eax, [data]; inc eax; mov [data], eax; retf
  struct { uint32_t offset; uint16_t selector; } __attribute__((packed)) far = {(uint32_t)(uintptr_t)low, 0x23};
  __asm__ volatile("mov %0, %%ds" ::"r"(0x2b)); // 32-bit code needs it
  for (int i = 0; i < 50; i++) {
    uint32_t at = data + (uint32_t)i * 4096;
    memcpy(code32 + 1, &at, 4);
    memcpy(code32 + 7, &at, 4);
    for (int k = 0; k < 3; k++)
      __asm__ volatile("mov %%rsp, %%r12; lea 0x7000(%0), %%rsp; lcall *(%1); mov %%r12, %%rsp"
                       ::"r"(low), "r"(&far) : "rax", "r12", "memory", "cc");
    CHECK("counted by 32-bit code", *(int *)(uintptr_t)at, 3);
  }
  __asm__ volatile("mov %0, %%ds" ::"r"(0));
  munmap(low, 64 * 4096);
}

static void identity(void) {
  unsigned first[4], again[4];
  for (int round = 0; round < 50; round++) {
    for (unsigned leaf = 0; leaf < 0x10; leaf++) {
      if (leaf == 1 || leaf == 0xb || leaf == 0xd) continue; // of the present processor, or its state
      __cpuid_count(leaf, 0, first[0], first[1], first[2], first[3]);
      compute(0.0001);
      __cpuid_count(leaf, 0, again[0], again[1], again[2], again[3]);
      CHECK("cpuid", memcmp(first, again, sizeof first), 0);
    }
  }
  uint64_t last = __rdtsc();
  double began = now();
  for (int i = 0; i < 2000; i++) {
    uint64_t t = __rdtsc();
    if (t < last) CHECK("the TSC goes back", t, last);
    last = t;
  }
  CHECK("it takes less than a second", now() - began < 1, 1);
  for (int i = 0; i < 200; i++) {
    cpu_set_t set;
    unsigned cpu = 99, node;
    CPU_ZERO(&set);
    CPU_SET(0, &set);
    sched_setaffinity(0, sizeof set, &set);
    syscall(SYS_getcpu, &cpu, &node, NULL);
    CHECK("processor", cpu, 0);
    CHECK("processor by the vDSO", sched_getcpu(), 0);
  }
  long pid;
  for (int i = 0; i < 50; i++) {
    // The 32-bit call of getpid.
    __asm__ volatile("int $0x80" : "=a"(pid) : "a"(20) : "r8", "r9", "r10", "r11", "memory");
    if (pid != -ENOSYS) CHECK("int 80h", pid, getpid());
  }
}

static void mappings(void) {
  char name[] = "/tmp/user-XXXXXX";
  int fd = mkstemp(name);
  unlink(name);
  static char block[4096 * 4];
  for (int i = 0; i < 40; i++) {
    memset(block, 'a' + i % 26, sizeof block);
    if (pwrite(fd, block, sizeof block, i % 4 * (long)sizeof block) < 0) fail(__func__, "pwrite", errno, 0);
    char *p = mmap((void *)0x700000000000, sizeof block, PROT_READ, MAP_SHARED | MAP_FIXED, fd, i % 4 * (long)sizeof block);
    for (int k = 0; k < 4; k++) CHECK("mapped file", p[k * 4096 + i], 'a' + i % 26);
    block[5000] = '!';
    if (pwrite(fd, block, sizeof block, i % 4 * (long)sizeof block) < 0) fail(__func__, "pwrite", errno, 0);
    CHECK("written meanwhile", p[5000], '!');
  }
  close(fd);
  size_t large = 8 << 20;
  char *p = mmap(0, large, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(p, large, MADV_HUGEPAGE);
  for (size_t i = 0; i < large; i += 4096) p[i] = (char)(i >> 12);
  for (size_t i = 0; i < large; i += 3 * 4096) mprotect(p + i, 4096, PROT_READ);
  compute(0.01);
  for (size_t i = 0; i < large; i += 4096) CHECK("in large pages", p[i], (char)(i >> 12));
  for (size_t i = 0; i < large; i += 8192) munmap(p + i, 4096);
  for (size_t i = 4096; i < large; i += 8192) CHECK("what is left of them", p[i], (char)(i >> 12));
  for (int round = 0; round < 50; round++) {
    char *q = pages(300);
    for (int i = 0; i < 300; i++) { CHECK("fresh page", q[i * 4096], 0); q[i * 4096] = 1; }
    munmap(q, 300 * 4096);
  }
}

static int deep(int n) {
  volatile char room[1000];
  room[n % 1000] = (char)n;
  return n ? deep(n - 1) + (room[n % 1000] != (char)n) : 0;
}

static void stack(void) {
  CHECK("deep calls", deep(5000), 0);
  for (int i = 0; i < 3; i++) {
    pid_t p = fork();
    if (!p) execl("/proc/self/exe", "user", "again", NULL);
    int status;
    waitpid(p, &status, 0);
    CHECK("itself", WEXITSTATUS(status), 7);
  }
}

static volatile long alarms;
static void alarmed(int s) {
  (void)s;
  alarms++;
}

static void timers(void) {
  signal(SIGALRM, alarmed);
  timer_t timer;
  struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
  timer_create(CLOCK_MONOTONIC, &event, &timer);
  struct itimerspec every = {{0, 5000000}, {0, 5000000}};
  timer_settime(timer, 0, &every, NULL);
  uint64_t x = 1;
  double end = now() + 20;
  while (alarms < 20 && now() < end)
    for (int i = 0; i < 100000; i++) x = x * 3 + 1;
  timer_delete(timer);
  CHECK("signals of a timer came", alarms >= 20, 1);
}

int main(int argc, char **argv) {
  (void)argv;
  if (argc > 1) return compute(0.03) ? 7 : 8;
  struct { const char *name; void (*run)(void); } all[] = {
    {"faults", faults}, {"exceptions", exceptions}, {"steps", steps}, {"copies", copies}, {"threads", threads}, {"code", code},
    {"registers", registers}, {"segments", segments}, {"identity", identity}, {"mappings", mappings}, {"stack", stack}, {"timers", timers},
  };
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    compute(0.03);
    all[i].run();
    printf("TEREM: %s ran\n", all[i].name);
    fflush(stdout);
  }
  return 0;
}
