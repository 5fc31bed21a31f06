; Virtual-8086 mode with and without its extensions, and protected-mode virtual interrupts (Intel SDM vol. 3, chapter
; "8086 Emulation"; AMD APM vol. 2, 8.10).
%include "common.inc"
%define VM 1 << 17
%define IOPL3 3 << 12
%define IF 1 << 9
%define TF 1 << 8
%define VIF 1 << 19
%define VIP 1 << 20
%define VME 1
%define PVI 2
%define CODE86 0x800
align 8
gdt:    usual_segments
gdt_end:
more:   ret

; vm NAME, flags, CR4, label of 16-bit code
%macro vm 4
        case %1
        mov eax, %3
        mov cr4, eax
        push 0x5000             ; GS FS DS ES
        push 0x4000
        push 0x3000
        push 0x2000
        push 0x1000             ; SS:SP
        push 0x12340100
        push VM | 2 | %2
        push CODE86
        push %4 - code86
        xor eax, eax
        iretd
        end
%endmacro
; The same with IOPL 0 and 3, with VME and without.
%macro all 3 ; NAME, flags, label
%strcat %%name %1, " at IOPL 0"
        vm %%name, %2, 0, %3
%strcat %%name %1, " at IOPL 3"
        vm %%name, IOPL3 | %2, 0, %3
%strcat %%name %1, " at IOPL 0 with VME"
        vm %%name, %2, VME, %3
%strcat %%name %1, " at IOPL 3 with VME"
        vm %%name, IOPL3 | %2, VME, %3
%endmacro

start:  mov esp, STACK0
        call setup
        ; The program's memory and its interrupt vectors.
        mov esi, code86
        mov edi, CODE86 * 16
        mov ecx, (code86_end - code86 + 3) / 4
        rep movsd
        mov word [0x60 * 4], taken60 - code86
        mov word [0x60 * 4 + 2], CODE86
        ; Interrupts 30h and 61h go to the monitor, all others to the program.
        mov byte [TSS_AT + 0x88 - 32 + 0x30 / 8], 1
        mov byte [TSS_AT + 0x88 - 32 + 0x61 / 8], 2
        mov byte [TSS_AT + 0x88 + 0x80 / 8], 2

        all "cli", IF, v_cli
        all "cli with VIF", IF | VIF, v_cli
        all "sti", 0, v_sti
        all "sti with VIP", VIP, v_sti
        all "pushf", IF, v_pushf
        all "pushf with VIF", VIF, v_pushf
        all "pushfd", 0, v_pushfd
        all "popf with IF", 0, v_popf
        all "popf without IF", IF | VIF, v_popf0
        all "popf with IF and VIP", VIP, v_popf
        all "popf with TF", 0, v_popf_tf
        all "popfd", 0, v_popfd
        all "iret", IF, v_iret
        all "iret without IF", IF | VIF, v_iret0
        all "iretd", 0, v_iretd
        all "int of the program", IF, v_int60
        all "int of the program with VIF", VIF, v_int60
        all "int of the monitor", 0, v_int61
        all "int 30h", 0, v_int30
        all "int3", 0, v_int3
        all "into", 0, v_into
        or byte [IDT_AT + 3 * 8 + 5], 0x60
        or byte [IDT_AT + 4 * 8 + 5], 0x60
        vm "int3 with a gate of privilege 3", 0, 0, v_int3
        vm "into with a gate of privilege 3", 0, 0, v_into
        vm "hlt", IOPL3, 0, v_hlt
        vm "in that the map allows", 0, 0, v_in
        vm "in that the map forbids", IOPL3, 0, v_in81
        vm "mov to cr0", IOPL3, 0, v_cr0
        vm "lgdt", IOPL3, 0, v_lgdt
        vm "sldt", IOPL3, 0, v_sldt
        vm "arpl", IOPL3, 0, v_arpl
        vm "lar", IOPL3, 0, v_lar
        vm "verr", IOPL3, 0, v_verr
        vm "ltr", IOPL3, 0, v_ltr
        vm "sysenter", IOPL3, 0, v_sysenter
        vm "ud2", IF, 0, v_ud2
        vm "div by zero", IF, 0, v_div
        vm "segments and far transfers", 0, 0, v_far
        vm "above the first megabyte", 0, 0, v_high
        vm "word at the end of a segment", 0, 0, v_limit
        vm "stack at the end of its segment", 0, 0, v_stack_limit
        vm "wide addresses", 0, 0, v_wide
        vm "single step", TF, 0, v_step

        ; A monitor that emulates and goes back.
        case "back into the program"
        mov dword [IDT_AT + 13 * 8], CODE0 << 16 | ((BASE + (monitor - header)) & 0xffff)
        mov word [IDT_AT + 13 * 8 + 6], (BASE + (monitor - header)) >> 16
        push 0
        push 0
        push 0
        push 0
        push 0x1000
        push 0x100
        push VM | 2
        push CODE86
        push v_loop - code86
        mov ecx, 5
        iretd
        end
        mov eax, stubs + 13 * 16
        mov [IDT_AT + 13 * 8], ax
        shr eax, 16
        mov [IDT_AT + 13 * 8 + 6], ax

        case "gate to privilege 3 from the program"
        mov word [IDT_AT + 0x31 * 8 + 2], CODE3
        push 0
        push 0
        push 0
        push 0
        push 0x1000
        push 0x100
        push VM | IOPL3 | 2
        push CODE86
        push v_int31 - code86
        iretd
        end

%macro pvi 4 ; NAME, flags, CR4, instruction
        case %1
        mov eax, %3
        mov cr4, eax
        ring3 %%there, %2 | 2
%%there: %4
        int 0x30
        end
%endmacro
        pvi "3: cli without PVI", IF, 0, cli
        pvi "3: cli with PVI", IF | VIF, PVI, cli
        pvi "3: sti with PVI", 0, PVI, sti
        pvi "3: sti with PVI and VIP", VIP, PVI, sti
        pvi "3: cli with PVI and IOPL 3", IF | VIF | IOPL3, PVI, cli
        pvi "3: cli with VME only", IF | VIF, VME, cli
        pvi "3: popf with PVI", IF | VIF, PVI, popfd
        power_off

; Steps over what faulted until CX has run out.
monitor:
        add esp, 4
        add dword [esp], 1
        dec ecx
        jz .end
        iretd
.end:   push 0xeeee
        push 0x99
        jmp report

bits 16
code86:
v_cli:  cli
        hlt
v_sti:  sti
        hlt
v_pushf:
        pushf
        pop ax
        hlt
v_pushfd:
        pushfd
        pop eax
        hlt
v_popf: push IF | 0x4401
        popf
        hlt
v_popf0:
        push 0x0002
        popf
        hlt
v_popf_tf:
        push TF | 2
        popf
        nop
        hlt
v_popfd:
        push dword 0x3f7002 | IF
        popfd
        hlt
v_iret: push 0x7002 | IF
        push CODE86
        push v_hlt - code86
        iret
v_iret0:
        push 2
        push CODE86
        push v_hlt - code86
        iret
v_iretd:
        push dword 0x3f7002
        push dword CODE86
        push dword v_hlt - code86
        iretd
v_int60:
        int 0x60
        hlt
taken60:
        mov ax, [ss:0xfe]       ; flags as they were pushed
        shl eax, 16
        mov ax, sp
        hlt
v_int61:
        int 0x61
        hlt
v_int30:
        int 0x30
        hlt
v_int31:
        int 0x31
        hlt
v_int3: int3
        hlt
v_into: mov al, 0x7f
        inc al
        into
        hlt
v_hlt:  hlt
v_in:   in al, 0x82
        mov ax, 0x55
        hlt
v_in81: in al, 0x81
        hlt
v_cr0:  mov cr0, eax
        hlt
v_lgdt: lgdt [0]
        hlt
v_sldt: sldt ax
        hlt
v_arpl: db 0x63, 0xc8
        hlt
v_lar:  lar ax, cx
        hlt
v_verr: verr ax
        hlt
v_ltr:  ltr ax
        hlt
v_sysenter:
        sysenter
        hlt
v_ud2:  ud2
v_div:  div cl
v_far:  call CODE86:(.there - code86)
        mov ax, 0x1234
        mov ds, ax
        mov [0], ax
        mov ax, 0x1230
        mov es, ax
        mov ax, [es:0x40]
        jmp CODE86 + 1:(.end - code86 - 16)
.there: push es
        pop fs
        retf
.end:   mov bx, cs
        hlt
v_high: mov ax, 0xffff
        mov ds, ax
        mov word [0x20], 0x5678
        mov ax, [0x20]
        hlt
v_limit:
        mov ax, [0xffff]
        hlt
v_stack_limit:
        mov sp, 1
        push ax
        hlt
v_wide: mov eax, 0x10000
        mov eax, [eax]
        hlt
v_step: nop
        hlt
v_loop: hlt
        hlt
        hlt
        hlt
        hlt
        hlt
code86_end:
bits 32
