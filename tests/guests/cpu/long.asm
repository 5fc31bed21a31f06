; Long mode (Intel SDM vol. 3, 5.8.3, 6.14; vol. 2): far transfers of all sizes in 64-bit and compatibility mode, call
; gates, interrupt stacks, iret, and what each does wrong. Loops run often enough to be translated.
%include "common.inc"
%define IDT64 0x280000
%define TSS64 0x282000
%define IST1 0x290000
align 16
gdt:    usual_segments
        seg CODE64, 0, 0xfffff, 0x9b, 0xa
        seg DATA64, 0, 0xfffff, 0x93, 0xc
        seg USER32, 0, 0xfffff, 0xfb, 0xc
        seg USERDATA, 0, 0xfffff, 0xf3, 0xc
        seg USER64, 0, 0xfffff, 0xfb, 0xa
        seg BOTH, 0, 0xfffff, 0x9b, 0xe
        seg ABSENT64, 0, 0xfffff, 0x1b, 0xa
        seg CONFORMING64, 0, 0xfffff, 0x9f, 0xa
        seg CODE16, BASE, 0xffff, 0x9b, 0
        seg TSS_64, TSS64, 0x67, 0x89, 0
        dq 0
        gate GATE64, CODE64, gate_target, 0xec, 0
        dq 0
        gate GATE_TO_32, CODE0, gate_target, 0xec, 0
        dq 0
        gate GATE_BAD, CODE64, gate_target, 0xec, 0
        dq 0x00000f0000000000
        gate GATE_HIGH, CODE64, gate_target, 0xec, 0
        dq 0x00008000
        gate GATE_INNER, CODE64, gate_target, 0x8c, 0
        dq 0
        gate TASK_GATE, TSS_64, header, 0xe5, 0
        seg TSS_16, TSS64, 0x67, 0x81, 0
        seg TSS_BUSY, TSS64, 0x67, 0x8b, 0
        dq 0
        gate GATE_END, CODE64, gate_target, 0xec, 0
gdt_end:
more:   ret

start:  mov esp, STACK0
        call setup
        ; One gigabyte mapped to itself in pages of 2 MiB, all for privilege 3.
        mov edi, 0x300000
        mov ecx, 0x3000 / 4
        xor eax, eax
        rep stosd
        mov dword [0x300000], 0x301007
        mov dword [0x301000], 0x302007
        mov edi, 0x302000
        mov eax, 0x87
        mov ecx, 512
.page:  mov [edi], eax
        add eax, 0x200000
        add edi, 8
        loop .page
        ; Interrupt gates of 64 bits; 30h–3Fh are for privilege 3, 38h has a stack of its own.
        mov edi, IDT64
        mov eax, stubs64
        mov ecx, 256
.gate:  mov [edi], ax
        mov word [edi + 2], CODE64
        mov word [edi + 4], 0x8e00
        mov edx, eax
        shr edx, 16
        mov [edi + 6], dx
        mov dword [edi + 8], 0
        mov dword [edi + 12], 0
        add edi, 16
        add eax, 16
        loop .gate
        mov ecx, 0x30
.user:  mov edx, ecx
        shl edx, 4
        mov byte [IDT64 + edx + 5], 0xee
        inc ecx
        cmp ecx, 0x40
        jb .user
        mov byte [IDT64 + 0x38 * 16 + 4], 1
        mov edi, TSS64
        mov ecx, 0x1a
        xor eax, eax
        rep stosd
        mov dword [TSS64 + 4], STACK0 - 0x1000
        mov dword [TSS64 + 0x24], IST1 + 4
        mov eax, 0x20
        mov cr4, eax
        mov eax, 0x300000
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x101           ; LME and SCE
        wrmsr
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        lidt [idt64]
        jmp CODE64:in_long

%macro case64 1
%push case
        mov esi, %%name
        mov dword [resume], %$next
        mov dword [base], %%begin
        call begin64
        jmp %%begin
%%name: db %1, 0
%%begin:
%endmacro
%macro end64 0
        jmp nothing64
%$next:
%pop
%endmacro
%macro user 1-2 USER64 | 3
        push USERDATA | 3
        push STACK3
        push 2
        push %2
        push %1
        iretq
%endmacro
%macro show64 3
        mov esi, %%text
        call puts64
        mov rax, %2
        mov cl, %3
        call hex64
        jmp %%over
%%text: db %1, 0
%%over:
%endmacro
bits 64
in_long: mov ax, DATA64
        mov ds, ax
        mov es, ax
        mov ss, ax
        mov ax, TSS_64
        ltr ax
        mov rsp, STACK0

        case64 "jmp far of 32 bits to compatibility mode"
        mov dword [SCRATCH], .compat
        mov word [SCRATCH + 4], CODE0
        jmp far dword [SCRATCH]
bits 32
.compat: mov eax, 0x1111
        int 0x30
bits 64
        end64
        case64 "jmp far of 64 bits"
        mov qword [SCRATCH], .wide
        mov word [SCRATCH + 8], CODE64
        jmp far qword [SCRATCH]
.wide:  mov eax, 0x2222
        int 0x30
        end64
        case64 "jmp far of 16 bits"
        mov word [SCRATCH], .small - header
        mov word [SCRATCH + 2], CODE16
        jmp far word [SCRATCH]
bits 16
.small: mov ax, 0x3333
        int 0x30
bits 64
        end64
        case64 "call far of 32 bits and back"
        mov rbx, rsp
        mov dword [SCRATCH], .called
        mov word [SCRATCH + 4], CODE64
        call far dword [SCRATCH]
        sub rbx, rsp
        mov rax, rbx
        int 0x30
.called: retf
        end64
        case64 "call far of 64 bits: its frame"
        mov rbx, rsp
        mov qword [SCRATCH], .called2
        mov word [SCRATCH + 8], CODE64
        call far qword [SCRATCH]
        int 0x30
.called2: mov rax, [rsp + 8]
        sub rbx, rsp
        shl rbx, 16
        or rax, rbx
        int 0x30
        end64
        case64 "call far into compatibility mode and back"
        mov rbx, rsp
        mov dword [SCRATCH], .called3
        mov word [SCRATCH + 4], CODE0
        call far dword [SCRATCH]
        sub rbx, rsp
        mov rax, rbx
        int 0x30
bits 32
.called3: retf
bits 64
        end64
        case64 "call gate of the same privilege"
        mov rbx, rsp
        mov word [SCRATCH + 4], GATE64
        call far dword [SCRATCH]
        int 0x30
        end64
%macro bad_far 2 ; case NAME, selector
        case64 %1
        mov dword [SCRATCH], nothing64
        mov word [SCRATCH + 4], %2
        jmp far dword [SCRATCH]
        end64
%endmacro
        bad_far "jmp far to null", 0
        bad_far "jmp far to data", DATA64
        bad_far "jmp far to L and D", BOTH
        bad_far "jmp far to absent code", ABSENT64
        bad_far "jmp far to another privilege", USER64
        bad_far "jmp far beyond the table", 0xff8
        bad_far "jmp far to a TSS", TSS_64
        bad_far "jmp far to a task gate", TASK_GATE
        bad_far "jmp far to a 16-bit TSS", TSS_16
        bad_far "jmp far to a gate to 32-bit code", GATE_TO_32
        bad_far "jmp far to a gate with a wrong second half", GATE_BAD
        bad_far "jmp far to a gate that is not canonical", GATE_HIGH
        bad_far "jmp far to a gate cut by the table's end", GATE_END
        bad_far "jmp far to conforming code", CONFORMING64
        case64 "jmp far to a place that is not canonical"
        mov rax, 1 << 47
        mov [SCRATCH], rax
        mov word [SCRATCH + 8], CODE64
        jmp far qword [SCRATCH]
        end64

        case64 "3: call gate"
        user .u1
.u1:    mov word [SCRATCH + 4], GATE64
        call far dword [SCRATCH]
        int 0x30
        end64
        case64 "3: call gate and back"
        user .u2
.u2:    mov dword [gate_returns], 1
        mov word [SCRATCH + 4], GATE64
        call far dword [SCRATCH]
        mov rax, rsp
        int 0x30
        end64
        mov dword [gate_returns], 0
        case64 "3: call gate of privilege 0"
        user .u3
.u3:    mov word [SCRATCH + 4], GATE_INNER
        call far dword [SCRATCH]
        end64
        case64 "3: call gate from compatibility mode"
        user .u4, USER32 | 3
bits 32
.u4:    call GATE64:0
        int 0x30
bits 64
        end64
        case64 "3: interrupt stack"
        user .u5
.u5:    int 0x38
        end64
        case64 "interrupt stack at privilege 0"
        int 0x38
        end64
        case64 "3: int of privilege 0"
        user .u6
.u6:    int 0x80
        end64
        case64 "3: null stack segment"
        user .u7
.u7:    xor eax, eax
        mov ss, ax
        end64
        case64 "null stack segment"
        xor eax, eax
        mov ss, ax
        mov eax, ss
        int 0x30
        end64
        mov ax, DATA64
        mov ss, ax
        case64 "3: syscall"
        mov ecx, 0xc0000081
        xor eax, eax
        mov edx, (USER32 - 0) << 16 | CODE64
        wrmsr
        inc ecx
        mov eax, .taken
        xor edx, edx
        wrmsr
        mov ecx, 0xc0000084
        mov eax, 0x700
        xor edx, edx
        wrmsr
        user .u8
.u8:    syscall
        int 0x30
.taken: mov rax, r11
        int 0x31
        end64
        case64 "sysret to compatibility mode"
        mov ecx, .u9
        mov r11d, 2
        o32 sysret
bits 32
.u9:    mov ax, cs
        shl eax, 16
        mov ax, ss
        int 0x30
bits 64
        end64

%macro iret64 3-4 USERDATA | 3 ; case NAME: CS, RIP, SS
        case64 %1
        push %4
        push STACK3
        push 2
        push %2
        mov rax, %3
        push rax
        iretq
        end64
%endmacro
        iret64 "iretq to null", 0, user64
        iret64 "iretq to data", DATA64, user64
        iret64 "iretq to L and D", BOTH, user64
        iret64 "iretq to absent code", ABSENT64, user64
        iret64 "iretq not canonical", USER64 | 3, 1 << 47
        iret64 "iretq to privilege 3", USER64 | 3, user64
        iret64 "iretq to privilege 3 without a stack segment", USER64 | 3, user64, 0
        iret64 "iretq to privilege 0 without a stack segment", CODE64, user64, 0
        iret64 "iretq to privilege 3 with another RPL", USER64 | 3, user64, DATA64
        iret64 "iretq to compatibility mode", USER32 | 3, user64
        iret64 "iretq to compatibility mode without a stack segment", USER32 | 3, user64, 0
        mov ax, DATA64
        mov ss, ax
        case64 "iretq with NT"
        push 0x4002
        popfq
        push DATA64
        push STACK0
        push 2
        push CODE64
        push user64
        iretq
        end64
        push 2
        popfq
        case64 "iretd in 64-bit mode"
        mov dword [rsp - 20], user64
        mov dword [rsp - 16], CODE64
        mov dword [rsp - 12], 2
        mov dword [rsp - 8], STACK3
        mov dword [rsp - 4], DATA64
        sub rsp, 20
        iretd
        end64

        case64 "3: stack that is not canonical"
        user .u10
.u10:   mov rax, 1 << 47
        mov rsp, rax
        push rax
        end64
        case64 "data that is not canonical"
        mov rax, 1 << 47
        mov rax, [rax]
        end64
        case64 "jump that is not canonical"
        mov rax, 1 << 47
        jmp rax
        end64
        case64 "lldt and ltr cut by the table's end"
        mov ax, GATE_END
        ltr ax
        end64
        case64 "ltr 16-bit"
        mov ax, TSS_16
        ltr ax
        end64
        case64 "lar and lsl of a 16-bit TSS"
        mov ecx, TSS_16
        lar eax, ecx
        setz bl
        mov ecx, TSS_BUSY
        lar eax, ecx
        setz bh
        mov eax, ebx
        int 0x30
        end64
        case64 "gate of 32 bits in the table"
        mov byte [IDT64 + 0x50 * 16 + 5], 0x86
        int 0x50
        end64
        case64 "gate to compatibility code"
        mov word [IDT64 + 0x51 * 16 + 2], CODE0
        int 0x51
        end64
        case64 "gate to a place that is not canonical"
        mov dword [IDT64 + 0x52 * 16 + 8], 0x8000
        int 0x52
        end64
        case64 "ud2 with an absent gate"
        mov byte [IDT64 + 6 * 16 + 5], 0x0e
        ud2
        end64
        mov byte [IDT64 + 6 * 16 + 5], 0x8e
        case64 "fault loop"
        mov ecx, 200
        mov qword [after], .again
.again: dec ecx
        jz .enough
        ud2
.enough: mov qword [after], 0
        mov eax, [count]
        int 0x30
        end64
        case64 "step through a loop that was hot"
        mov ecx, 1000
.hot:   add ebx, ecx
        dec ecx
        jnz .hot
        mov ecx, 3
        push 0x102
        popfq
.hot2:  add ebx, ecx
        dec ecx
        jnz .hot2
        end64
        case64 "breakpoint in a loop that is hot"
        xor ebx, ebx
        mov ecx, 2000
.loop:  inc ebx
        cmp ebx, 1000
        jne .not
        mov eax, .not2
        mov dr0, rax
        mov eax, 0x402
        mov dr7, rax
.not:   nop
.not2:  dec ecx
        jnz .loop
        end64
        xor eax, eax
        mov dr7, rax
        case64 "watched data in a loop that is hot"
        mov ecx, 2000
        mov edi, SCRATCH
        mov eax, SCRATCH + 0x900 * 4
        mov dr0, rax
        mov eax, 0xd0402
        mov dr7, rax
        mov ebx, 0x300
.store: mov [rdi + rbx * 4], ebx
        inc ebx
        dec ecx
        jnz .store
        end64
        xor eax, eax
        mov dr7, rax
        mov dx, 0x604
        mov ax, 1 << 13
        out dx, ax
        mov ax, 7 << 10 | 1 << 13
        out dx, ax
        jmp $

user64: int 0x31
gate_target:
        cmp dword [gate_returns], 0
        je .report
        o64 retf
.report: mov rax, [rsp + 8]     ; CS
        int 0x32

begin64:
        pop rax
        mov [saved_esp], esp
        push rax
        call puts64
        xor eax, eax
        xor ebx, ebx
        xor ecx, ecx
        xor edx, edx
        xor edi, edi
        xor ebp, ebp
        ret
nothing64:
        mov esp, [saved_esp]
        push CODE64
        push .here
        o64 retf
.here:
        show64 ": nothing a=", rbx, 16
        mov al, 10
        call putc64
        mov eax, [resume]
        jmp rax
report64:
        cmp qword [after], 0
        jne go_on
        push rax
        mov rbp, rsp
        cld
        show64 ": v=", [rbp + 8], 2
        show64 " e=", [rbp + 16], 4
        mov rbx, [rbp + 24]
        mov eax, [base]
        sub rbx, rax
        show64 " ip=", rbx, 16
        show64 " cs=", [rbp + 32], 4
        mov rbx, [rbp + 40]
        and ebx, FLAGS
        show64 " fl=", rbx, 6
        show64 " sp=", [rbp + 48], 16
        show64 " ss=", [rbp + 56], 4
        show64 " a=", [rbp], 16
        lea rbx, [rbp + 64]
        show64 " at=", rbx, 8
        mov rbx, ss
        show64 " newss=", rbx, 4
        mov rbx, dr6
        show64 " dr6=", rbx, 4
        mov eax, 0xffff0ff0
        mov dr6, rax
        mov al, 10
        call putc64
        mov ax, DATA64
        mov ss, ax
        mov esp, [saved_esp]
        mov eax, [resume]
        jmp rax
; Counts, and goes on elsewhere.
go_on:  inc dword [count]
        push rax
        mov rax, [after]
        mov [rsp + 24], rax
        pop rax
        add rsp, 16
        iretq
puts64: lodsb
        test al, al
        jz .end
        call putc64
        jmp puts64
.end:   ret
putc64: push rdx
        push rax
        mov dx, 0x3fd
.wait:  in al, dx
        test al, 0x20
        jz .wait
        mov dx, 0x3f8
        pop rax
        out dx, al
        pop rdx
        ret
hex64:  push rbx
        movzx ecx, cl
        mov rbx, rax
        push rcx
        neg ecx
        add ecx, 16
        shl ecx, 2
        shl rbx, cl
        pop rcx
.more:  rol rbx, 4
        mov al, bl
        and al, 15
        add al, '0'
        cmp al, '9'
        jbe .digit
        add al, 'a' - '9' - 1
.digit: call putc64
        loop .more
        pop rbx
        ret
align 16
%macro stub64 1
        align 16
%if %1 != 8 && (%1 < 10 || %1 > 14) && %1 != 17
        push strict dword 0xeeee
%endif
        push strict dword %1
        jmp strict near report64
%endmacro
stubs64:
%assign v 0
%rep 256
        stub64 v
%assign v v + 1
%endrep
align 8
idt64:  dw 0xfff
        dd IDT64
        dd 0
align 8
after:  dq 0
count:  dd 0
gate_returns: dd 0
bits 32
