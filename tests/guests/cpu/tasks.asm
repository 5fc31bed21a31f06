; Hardware task switches (Intel SDM vol. 3, chapter "Task Management"): by jmp, call, int, exceptions and iret, to 32- and
; 16-bit tasks and into virtual-8086 mode, and what each does wrong.
;
; Lines say further: tr, which TSS descriptors are busy (main, second, 16-bit, third), the second's, the 16-bit one's and the
; third's back links, main's saved EIP relative to the case and its flags, CR0.TS, DR6's upper bits and DR7.
%include "common.inc"
%define TSS2_AT 0x250000
%define TSS16_AT 0x251000
%define TSS3_AT 0x252000
%define STACK2 0x260000
%define ERROR_STACK 0x270000
align 8
gdt:    usual_segments
        seg TSS2, TSS2_AT, 0x67, 0x89, 0
        seg TSS16, TSS16_AT, 0x2b, 0x81, 0
        seg TSS_BRIEF, TSS2_AT, 0x66, 0x89, 0
        seg TSS_ABSENT, TSS2_AT, 0x67, 0x09, 0
        seg TSS16_BRIEF, TSS16_AT, 0x2a, 0x81, 0
        seg TSS_BIG, TSS2_AT, 0x67, 0xe9, 0
        seg TSS3, TSS3_AT, 0x67, 0x89, 0
        gate TASK2, TSS2, header, 0x85, 0
        gate TASK16, TSS16, header, 0x85, 0
        gate TASK_USER, TSS2, header, 0xe5, 0
        gate TASK_ABSENT, TSS2, header, 0x05, 0
        seg LDT, BASE + (ldt - header), 15, 0x82, 0
        seg LDT_ABSENT, BASE + (ldt - header), 15, 0x02, 0
        seg ABSENT, 0, 0xfffff, 0x13, 0xc
        seg ABSENT_CODE, 0, 0xfffff, 0x1b, 0xc
        seg LOW, 0, 0xff, 0x9b, 0x4
        seg CODE16, BASE, 0xffff, 0x9b, 0
        seg READ, 0, 0xfffff, 0x91, 0xc
gdt_end:
align 8
ldt:    dq 0x00cf93000000ffff, 0x00cff3000000ffff

; What a line ends with; then everything is as it was.
more:   xor ebx, ebx
        str bx
        show " tr=", ebx, 4
        movzx ebx, byte [gdt + TSS + 5]
        shl ebx, 8
        mov bl, [gdt + TSS2 + 5]
        shl ebx, 8
        mov bl, [gdt + TSS16 + 5]
        shl ebx, 8
        mov bl, [gdt + TSS3 + 5]
        show " busy=", ebx, 8
        show " link=", [TSS2_AT], 4
        show "/", [TSS16_AT], 4
        show "/", [TSS3_AT], 4
        mov ebx, [TSS_AT + 0x20]
        test ebx, ebx
        jz .none
        sub ebx, [base]
.none:  show " old=", ebx, 8
        mov ebx, [TSS_AT + 0x24]
        and ebx, FLAGS
        show " oldfl=", ebx, 6
        mov ebx, cr0
        and ebx, 8
        show " ts=", ebx, 1
        xor ebx, ebx
        sldt bx
        show " ldt=", ebx, 4
        mov ebx, dr6
        and ebx, 0xe000
        show " dr6=", ebx, 4
        mov ebx, dr7
        show " dr7=", ebx, 8
reset:  clts
        mov eax, 0xffff0ff0
        mov dr6, eax
        mov eax, 0x400
        mov dr7, eax
        push dword 2
        popfd
        xor ax, ax
        lldt ax
        mov byte [gdt + TSS + 5], 0x89
        mov byte [gdt + TSS2 + 5], 0x89
        mov byte [gdt + TSS16 + 5], 0x81
        mov byte [gdt + TSS3 + 5], 0x89
        mov ax, TSS
        ltr ax
        mov edi, TSS_AT
        mov ecx, 0x66 / 2
        xor eax, eax
        rep stosw
        mov dword [TSS_AT + 4], STACK0 - 0x1000
        mov word [TSS_AT + 8], DATA0
; The second task as most cases want it.
        mov edi, TSS2_AT
        mov ecx, 0x1a
        xor eax, eax
        rep stosd
        mov word [TSS2_AT], 0x7777
        mov dword [TSS2_AT + 4], STACK0 - 0x2000
        mov word [TSS2_AT + 8], DATA0
        mov dword [TSS2_AT + 0x20], task2
        mov dword [TSS2_AT + 0x24], 2
        mov dword [TSS2_AT + 0x28], 0xa2a2a2a2
        mov dword [TSS2_AT + 0x38], STACK2
        mov word [TSS2_AT + 0x48], DATA0
        mov word [TSS2_AT + 0x4c], CODE0
        mov word [TSS2_AT + 0x50], DATA0
        mov word [TSS2_AT + 0x54], DATA0
        mov word [TSS2_AT + 0x66], 0x68
        mov edi, TSS3_AT
        mov ecx, 0x1a
        xor eax, eax
        rep stosd
        mov dword [TSS3_AT + 0x20], task_error
        mov dword [TSS3_AT + 0x24], 2
        mov dword [TSS3_AT + 0x38], ERROR_STACK
        mov word [TSS3_AT + 0x48], DATA0
        mov word [TSS3_AT + 0x4c], CODE0
        mov word [TSS3_AT + 0x50], DATA0
        mov word [TSS3_AT + 0x54], DATA0
        mov edi, TSS16_AT
        mov ecx, 0x16
        xor eax, eax
        rep stosw
        mov word [TSS16_AT + 0x0e], task16 - header
        mov word [TSS16_AT + 0x10], 2
        mov word [TSS16_AT + 0x12], 0x1616
        mov word [TSS16_AT + 0x1a], 0x8000
        mov word [TSS16_AT + 0x22], DATA0
        mov word [TSS16_AT + 0x24], CODE16
        mov word [TSS16_AT + 0x26], DATA0
        mov word [TSS16_AT + 0x28], DATA0
        ret

task2:  int 0x32
task_iret:
        iretd
        mov eax, 0x1e1e
        int 0x33                ; the task goes on here when it is called again
; Shows what is on the stack: an error code.
task_error:
        mov eax, [esp]
        sub esp, -4
        int 0x34
bits 16
task16: mov ax, sp
        jmp dword CODE0:task2
task16_iret:
        iret
bits 32

%macro to 3 ; case NAME, setting of the second task, how
        case %1
        mov ecx, 0xcccccccc
        mov ebx, 0xbbbbbbbb
        %2
        %3
        mov eax, ecx
        int 0x30
        end
%endmacro
%define fill(offset, value) mov dword [TSS2_AT + offset], value
%define user2 mov word [TSS2_AT + 0x4c], CODE3 | 3

start:  mov esp, STACK0
        call setup
        call reset

        to "jmp", nop, jmp TSS2:0x1234
        to "call", nop, call TSS2:0
        to "jmp through a gate", nop, jmp TASK2:0
        to "call through a gate", nop, call TASK2:0
        to "call and iret", {fill(0x20, task_iret)}, call TSS2:0
        case "call and iret twice"
        fill(0x20, task_iret)
        call TSS2:0
        call TSS2:0
        end
        to "jmp to a 16-bit task", nop, jmp TSS16:0
        to "call to a 16-bit task", nop, call TSS16:0
        to "call to a 16-bit task and back", {mov word [TSS16_AT + 0x0e], task16_iret - header}, call TSS16:0

        mov dword [IDT_AT + 0x40 * 8], TSS2 << 16
        mov word [IDT_AT + 0x40 * 8 + 4], 0x8500
        mov dword [IDT_AT + 0x41 * 8], TSS16 << 16
        mov word [IDT_AT + 0x41 * 8 + 4], 0x8500
        to "int", nop, int 0x40
        to "int and iret", {fill(0x20, task_iret)}, int 0x40
        to "int to a 16-bit task", nop, int 0x41

        ; Exceptions through task gates.
        mov dword [IDT_AT + 6 * 8], TSS2 << 16
        mov word [IDT_AT + 6 * 8 + 4], 0x8500
        to "ud2", nop, ud2
        mov dword [IDT_AT + 11 * 8], TSS2 << 16
        mov word [IDT_AT + 11 * 8 + 4], 0x8500
        case "absent segment: an error code on the task's stack"
        fill(0x20, task_error)
        mov ax, ABSENT
        mov fs, ax
        end
        case "int of an absent gate is an exception with an error code"
        fill(0x20, task_error)
        and byte [IDT_AT + 0x42 * 8 + 5], 0x7f
        int 0x42
        end
        mov eax, stubs + 11 * 16
        call restore_11
        mov eax, stubs + 6 * 16
        call restore_6

        to "jmp to itself", nop, jmp TSS:0
        to "jmp to a busy task", {mov byte [gdt + TSS2 + 5], 0x8b}, jmp TSS2:0
        to "jmp to a short task", nop, jmp TSS_BRIEF:0
        to "jmp to a short 16-bit task", nop, jmp TSS16_BRIEF:0
        to "jmp to an absent task", nop, jmp TSS_ABSENT:0
        to "jmp through an absent gate", nop, jmp TASK_ABSENT:0
        to "jmp with another RPL", nop, jmp TSS2 | 1:0
        case "3: jmp to a task"
        ring3 .t3
.t3:    jmp TSS2:0
        end
        case "3: jmp through a gate of privilege 0"
        ring3 .t3b
.t3b:   jmp TASK2:0
        end
        case "3: jmp through a gate of privilege 3"
        ring3 .t3c
.t3c:   mov eax, 5
        jmp TASK_USER:0
        end
        case "3: call of a task of privilege 3 and back"
        fill(0x20, task_iret)
        ring3 .t3d
.t3d:   mov eax, 5
        call TSS_BIG:0
        int 0x30
        end
        case "iret to a task that is not busy"
        mov word [TSS_AT], TSS2
        push 2 | 1 << 14
        popfd
        iretd
        end
        case "iret to a task that is busy"
        mov word [TSS_AT], TSS2
        mov byte [gdt + TSS2 + 5], 0x8b
        push 2 | 1 << 14
        popfd
        iretd
        end
        case "iret to an LDT's task"
        mov word [TSS_AT], TSS2 | 4
        push 2 | 1 << 14
        popfd
        iretd
        end

        ; What is wrong with a task's registers is the new task's fault. It may have no stack: a task takes it.
        mov dword [IDT_AT + 10 * 8], TSS3 << 16
        mov word [IDT_AT + 10 * 8 + 4], 0x8500
        mov dword [IDT_AT + 11 * 8], TSS3 << 16
        mov word [IDT_AT + 11 * 8 + 4], 0x8500
        mov dword [IDT_AT + 12 * 8], TSS3 << 16
        mov word [IDT_AT + 12 * 8 + 4], 0x8500
        to "code segment null", {fill(0x4c, 0)}, jmp TSS2:0
        to "code segment is data", {fill(0x4c, DATA0)}, jmp TSS2:0
        to "code segment absent", {fill(0x4c, ABSENT_CODE)}, jmp TSS2:0
        to "code segment with another RPL", {fill(0x4c, CODE0 | 3)}, jmp TSS2:0
        to "code segment beyond the table", {fill(0x4c, 0x7f8)}, jmp TSS2:0
        to "stack segment null", {fill(0x50, 0)}, jmp TSS2:0
        to "stack segment read-only", {fill(0x50, READ)}, jmp TSS2:0
        to "stack segment absent", {fill(0x50, ABSENT)}, jmp TSS2:0
        to "stack segment of another privilege", {fill(0x50, DATA3)}, jmp TSS2:0
        to "data segment is a gate", {fill(0x54, TASK2)}, jmp TSS2:0
        to "data segment absent", {fill(0x54, ABSENT)}, jmp TSS2:0
        to "data segment null", {fill(0x54, 0)}, jmp TSS2:0
        to "fs beyond the table", {fill(0x58, 0x7f8)}, jmp TSS2:0
        to "gs absent", {fill(0x5c, ABSENT)}, call TSS2:0
        to "ldt", {fill(0x60, LDT)}, jmp TSS2:0
        to "ldt is data", {fill(0x60, DATA0)}, jmp TSS2:0
        to "ldt absent", {fill(0x60, LDT_ABSENT)}, jmp TSS2:0
        to "ldt of the ldt", {fill(0x60, LDT | 4)}, jmp TSS2:0
        case "data segment of the ldt"
        fill(0x60, LDT)
        fill(0x54, 4)
        jmp TSS2:0
        end
        to "eip beyond the limit", {fill(0x4c, LOW)}, jmp TSS2:0
        to "fault of a nested task", {fill(0x4c, 0)}, call TSS2:0

        mov eax, stubs + 10 * 16
        mov edx, CODE0 << 16
        mov dx, ax
        mov [IDT_AT + 10 * 8], edx
        mov ax, 0x8e00
        mov [IDT_AT + 10 * 8 + 4], eax
        case "task of privilege 3"
        user2
        fill(0x48, DATA3)
        fill(0x50, DATA3 | 3)
        fill(0x54, DATA3)
        fill(0x20, .user)
        jmp TSS2:0
.user:  int 0x30
        end
        case "task of privilege 3 with inner data"
        user2
        fill(0x50, DATA3 | 3)
        jmp TSS2:0
        end
        case "task in virtual-8086 mode"
        fill(0x24, 1 << 17 | 2)
        fill(0x4c, 0x800)
        fill(0x20, 0)
        fill(0x50, 0x900)
        fill(0x38, 0x100)
        fill(0x54, 0x1234)
        mov byte [0x8000], 0xf4
        jmp TSS2:0
        end
        case "flags of a task"
        fill(0x24, 0x247602)
        jmp TSS2:0
        end
        case "trap bit"
        mov word [TSS2_AT + 0x64], 1
        jmp TSS2:0
        end
        case "single step into a task"
        fill(0x24, 0x102)
        fill(0x20, .stepped)
        jmp TSS2:0
.stepped: nop
        nop
        end
        case "local breakpoints end with the task"
        mov eax, 0x355
        mov dr7, eax
        jmp TSS2:0
        end

        ; Page tables of its own: 800000h is elsewhere there.
        mov edi, 0x300000
        mov ecx, 1024
        mov eax, 0x83
.fill:  mov [edi], eax
        mov [edi + 0x1000], eax
        add eax, 0x400000
        add edi, 4
        loop .fill
        mov dword [0x300000 + 8], 0x00000083 | 0x800000
        mov dword [0x301000 + 8], 0x00000083 | 0xc00000
        mov dword [0x800000], 0x11111111
        mov dword [0xc00000], 0x22222222
        mov eax, cr4
        or al, 0x10
        mov cr4, eax
        mov eax, 0x300000
        mov cr3, eax
        mov eax, cr0
        or eax, 0x80000000
        mov cr0, eax
        jmp .paged
.paged: case "page tables of a task"
        fill(0x1c, 0x301000)
        fill(0x20, .other)
        mov ebx, [0x800000]
        jmp TSS2:0
.other: mov eax, [0x800000]
        int 0x30
        end
        power_off

restore_6:
        mov edx, CODE0 << 16
        mov dx, ax
        mov [IDT_AT + 6 * 8], edx
        mov ax, 0x8e00
        mov [IDT_AT + 6 * 8 + 4], eax
        ret
restore_11:
        mov edx, CODE0 << 16
        mov dx, ax
        mov [IDT_AT + 11 * 8], edx
        mov ax, 0x8e00
        mov [IDT_AT + 11 * 8 + 4], eax
        ret
